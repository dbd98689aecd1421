"""The tiny model of the command tests, for whole runs of verbs."""

from tests.commands.conftest import tiny_llama

__all__ = ["tiny_llama"]
