"""Tests of polybit/robust."""
