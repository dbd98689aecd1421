"""Tests of the evals: every scorer against its twin, the official examples, and models that know nothing or all."""
