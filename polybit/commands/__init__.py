"""The acts behind the command line; the only room that joins the others."""
