"""Training by two processes under FSDP2: the losses of one, half of the memory, resumed by any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polybit.acts.launch import by_processes
from polybit.core.runtime import PolybitError
from polybit.options.train import TrainOptions
from polybit.train.fit import PARTS, Course, parts_of

ROOT = Path(__file__).resolve().parents[2]


def trained(kind, out, processes=1, kill_at=-1):
    """What a run of one or more processes found; None where it was killed."""
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [] if processes == 1 else ["--nproc-per-node", str(processes)]
    words = [*start, str(ROOT / "tests/train/sharded_run.py"), kind, str(out), str(kill_at)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    if kill_at >= 0:
        assert done.returncode
        return None
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(f"{out}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "learned", "nested", "lora", "chained", "balanced"])
def test_two_processes_train_as_one_in_half_of_the_memory(tmp_path, kind):
    one, two = (trained(kind, tmp_path / str(n), n) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-7)
    assert max(abs(a - b) for a, b in zip(one["weights"], two["weights"], strict=True)) < 1e-5
    assert two["bytes"] + two["buffers"] < 0.65 * (one["bytes"] + one["buffers"])
    for ours, theirs in zip(one["probes"], two["probes"], strict=True):
        for name, numbers in ours.items():
            assert theirs[name]["kl"] == pytest.approx(numbers["kl"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(tmp_path, before, after):
    whole = trained("latents", tmp_path / "whole")
    trained("latents", tmp_path / "killed", before, kill_at=3)
    resumed = trained("latents", tmp_path / "killed", after)
    assert 0 < len(resumed["losses"]) < len(whole["losses"]) or resumed["losses"] == whole["losses"]
    assert resumed["losses"][-3:] == pytest.approx(whole["losses"][-3:], rel=1e-5)
    assert max(abs(a - b) for a, b in zip(whole["weights"], resumed["weights"], strict=True)) < 1e-5


def test_a_run_keeps_the_parts_of_its_batches(tmp_path, monkeypatch):
    assert parts_of(tmp_path, Course(batch=8)) == 1
    (tmp_path / PARTS).write_text('{"parts": 3}')
    assert parts_of(tmp_path, Course(batch=6)) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PolybitError, match="begun with its batches in 3 parts, which 2 processes cannot share"):
        parts_of(tmp_path, Course(batch=6))
    (tmp_path / PARTS).unlink()
    with pytest.raises(PolybitError, match="a batch of 3 rows cannot be cut into 2 equal parts, for 2 processes"):
        parts_of(tmp_path, Course(batch=3))


def test_other_numbers_of_processes_than_torchrun_started_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PolybitError, match="--processes 3, and torchrun started 2"):
        by_processes("x:y", "model", TrainOptions(out=tmp_path, processes=3), lambda *_: None)
