"""What is freed is kept for the next step while training, and given back afterwards."""

import subprocess
import sys

import pytest

from polybit.core.memory import MOST_KEPT, SMALLEST, Kept, return_large

FAULTS = """
import resource
import torch
from polybit.core.memory import keeping_freed, return_large

PAGES = 2048  # of one tensor of 8 MiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(PAGES * 1024)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / PAGES

return_large(0)
print(faults())
with keeping_freed():
    faults()
    print(faults())
print(faults())
"""  # tensors that the system had to find pages for, of ten made and freed one after another


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other allocators decide by themselves")
def test_freed_memory_is_used_again_inside_and_given_back_outside():
    """In a process of its own: a hole that another test left is used before anything is asked of the system."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, inside, after = map(float, done.stdout.split())
    assert before > 9 and inside < 1 and after > 0.9


def test_what_is_given_back_at_once_follows_what_a_run_may_take():
    for allowed, pieces in ((64 << 30, MOST_KEPT), (256 << 20, 4 << 20), (0, SMALLEST)):
        return_large(allowed)
        assert Kept.pieces == pieces
        return_large()
        assert Kept.pieces == pieces
