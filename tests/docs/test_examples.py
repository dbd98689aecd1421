"""The worked examples in docstrings give what they say."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "name", ["polybit.quant.nested", "polybit.train.chain", "polybit.train.latent", "polybit.kernels.ops"]
)
def test_docstring_examples(name):
    done = doctest.testmod(import_module(name))
    assert done.attempted and not done.failed
