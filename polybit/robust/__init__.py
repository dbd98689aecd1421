"""Adversarial inputs: how a model at one precision is attacked, and how it does at another."""
