"""The acts: one plain function per thing polybit does, each joining the rooms below; the command line wraps them."""
