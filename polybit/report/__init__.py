"""run.json in, Markdown, figures and HTML out."""
