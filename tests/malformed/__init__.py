"""Broken models and checkpoints, each refused with one clear sentence."""
