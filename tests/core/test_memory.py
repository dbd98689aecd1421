"""What is freed is kept for the next step while training, and given back afterwards."""

import subprocess
import sys

import pytest

from polybit.core import memory
from polybit.core.memory import MOST_KEPT, SMALLEST, Kept, container_limits, fits, free_bytes, most_bytes, return_large

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


def written(root, files):
    """Files of a system, by path."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_of_control_groups_are_seen_wherever_they_are_set(tmp_path):
    """A slice of systemd (version 2), a container that sees itself as the root, Docker without its own view (1)."""
    stat = "anon 5\nfile 40\ninactive_file 10\nactive_file 20\n"
    slices = {
        "proc/self/cgroup": "0::/user.slice/job:a.scope\n",
        "sys/fs/cgroup/user.slice/job:a.scope/memory.max": "max\n",
        "sys/fs/cgroup/user.slice/job:a.scope/memory.high": "900\n",
        "sys/fs/cgroup/user.slice/job:a.scope/memory.current": "100\n",
        "sys/fs/cgroup/user.slice/job:a.scope/memory.stat": stat,
        "sys/fs/cgroup/user.slice/memory.max": "800\n",
        "sys/fs/cgroup/user.slice/memory.current": "300\n",
    }
    assert container_limits(written(tmp_path / "slices", slices)) == [(900, 70), (800, 300)]
    alone = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "700\n",
        "sys/fs/cgroup/memory.current": "50\n",
    }
    assert container_limits(written(tmp_path / "alone", alone)) == [(700, 50)]
    outside = {
        "proc/self/cgroup": "4:cpu:/docker/ab\n3:memory:/docker/ab\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "600\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "90\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 30\ninactive_file 4\n",
    }
    assert container_limits(written(tmp_path / "outside", outside)) == [(600, 60)]
    assert container_limits(tmp_path) == []


def test_nothing_readable_in_proc_leaves_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(memory, "text_of", lambda path: "")
    assert 0 < free_bytes() <= most_bytes() and fits(1, None) and not fits(1 << 60, 2e9)


def test_a_limit_of_the_shell_counts_what_the_process_has_taken_already():
    said = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    said += "from polybit.core.memory import *\nprint(most_bytes(), free_bytes())"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    most, free = map(int, done.stdout.split())
    assert most == 3 << 30 and free < most - (100 << 20)
