"""What is freed is kept for the next step while training, and given back afterwards."""

import resource
import sys

import pytest
import torch

from polybit.core.memory import keeping_freed, return_large

PAGES = 2048  # of one tensor of 8 MiB


def faults():
    """Pages that the system had to find for ten tensors made and freed one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(PAGES * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other allocators decide by themselves")
def test_freed_memory_is_used_again_inside_and_given_back_outside():
    return_large()
    assert faults() > 9 * PAGES
    with keeping_freed():
        faults()
        assert faults() < PAGES
    assert faults() > 0.9 * PAGES
