"""Modules whose precision changes while the model runs (torch only)."""
