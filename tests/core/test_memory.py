"""What is freed is kept for the next step while training, and given back afterwards."""

import resource
import sys

import pytest
import torch

from polybit.core.memory import MOST_KEPT, SMALLEST, Kept, keeping_freed, return_large

PAGES = 2048  # of one tensor of 8 MiB


def faults():
    """Pages that the system had to find for ten tensors made and freed one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(PAGES * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other allocators decide by themselves")
def test_freed_memory_is_used_again_inside_and_given_back_outside():
    return_large(0)
    assert faults() > 9 * PAGES
    with keeping_freed():
        faults()
        assert faults() < PAGES
    assert faults() > 0.9 * PAGES


def test_what_is_given_back_at_once_follows_what_a_run_may_take():
    for allowed, pieces in ((64 << 30, MOST_KEPT), (256 << 20, 4 << 20), (0, SMALLEST)):
        return_large(allowed)
        assert Kept.pieces == pieces
        return_large()
        assert Kept.pieces == pieces
