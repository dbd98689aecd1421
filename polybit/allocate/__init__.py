"""Spend a budget of bits where the model needs them."""
