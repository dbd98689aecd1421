"""Hugging Face in and out: the only room that imports transformers."""
