"""Tests of polybit/nn."""
