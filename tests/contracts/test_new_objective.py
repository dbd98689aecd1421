"""A new objective or schedule is one file and one table line: the verbs take it, with help, defaults and refusals."""

import json
import os
import subprocess
import sys

import pytest

from polybit.train.table import ANSWER_OBJECTIVES
from tests.commands.conftest import tiny_llama  # noqa: F401

FILE = '''
from dataclasses import dataclass

from polybit.train.distill import token_divergence


@dataclass(frozen=True)
class Halved:
    """Half of the KL to the float model's answers."""

    separable: bool = True
    needs: frozenset = frozenset({"chosen"})

    def __call__(self, forward, batch, presets):
        part, total, logs = batch["chosen"], 0.0, {}
        for preset in presets:
            each_N = token_divergence(forward(part, preset).float(), part["top_logp_NK"], part["top_index_NK"])
            total = total + each_N.mean() / 2
            logs[f"{preset}/half"] = float(each_N.mean().detach()) / 2
        return total, logs


def halved(knobs):
    return Halved()


def first_only(knobs):
    from polybit.train.cascade import Cascade

    return Cascade("joint", data=knobs.data)


def to_and_fro(plans, layers, *, steps, cycles, seed):
    """A, B, C, C, B, A, A, ...: there and back."""
    return lambda step, presets: ((*presets, *reversed(presets))[step % (2 * len(presets))],)
'''
LINE = """
import sys
from polybit.train import table
table.ANSWER_OBJECTIVES["halved"] = table.AnswerObjective("halved:halved", "half of kd", rate=2e-3)
table.LESSON_OBJECTIVES["plain"] = table.LessonObjective("halved:first_only", "nobody teaches", taught=False)
table.SCHEDULES["fro"] = table.TrainingSchedule("halved:to_and_fro", "there and back")
from polybit.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def polybit(tmp_path_factory):
    """`polybit`, as it would be with the file and the line; gives the finished process."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "halved.py").write_text(FILE)

    def run(*words):
        paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
        command = [sys.executable, "-c", LINE, *map(str, words)]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)

    return run


def test_help_and_refusals_know_it(polybit):
    told = " ".join(polybit("align", "--help").stdout.replace("│", " ").split())
    assert "halved = half of kd" in told and "0.002 for halved" in told
    refused = polybit("align", "x", "--pairs", "p", "--out", "o", "--method", "magic").stderr
    assert all(f'"{name}"' in refused for name in ("halved", *ANSWER_OBJECTIVES))
    refused = polybit("align", "x", "--pairs", "p", "--out", "o", "--method", "halved", "--shared-prefix").stderr
    assert "belongs to --method qdpo, not to halved" in refused


def test_it_trains_a_checkpoint(polybit, tiny_llama, tmp_path):  # noqa: F811
    (tmp_path / "p.txt").write_text("".join(f"Tell me about number {n}.\n" for n in range(12)))
    few = ["--precision", "w2", "--group-size", "16", "--max-tokens", "8", "--steps", "4", "--batch", "4"]
    told = ["--prompts", tmp_path / "p.txt", "--probes", "2", "--held-out", "2", "--json", tmp_path / "run.json"]
    done = polybit("align", tiny_llama, "--method", "halved", "--out", tmp_path / "out", *few, *told)
    assert not done.returncode, done.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["method"] == "halved" and any("w2/half" in entry for entry in run["numbers"]["log"])
    notes = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["notes"]
    assert notes["aligned"]["method"] == "halved" and notes["aligned"]["learning_rate"] == 2e-3


def test_train_takes_an_objective_and_a_schedule(polybit, tiny_llama, tmp_path):  # noqa: F811
    told = " ".join(polybit("train", "--help").stdout.replace("│", " ").split())
    assert "plain = nobody teaches" in told and "fro = there and back" in told
    flags = [
        "--out",
        tmp_path / "out",
        "--presets",
        "A=w8,B=w3",
        "--group-size",
        "16",
        "--rows",
        "16",
        "--length",
        "120",
    ]
    new = ["--method", "plain", "--schedule", "fro"]
    refused = polybit("train", tiny_llama, *flags, *new, "--labels", "0")
    assert "--method plain learns from the data alone" in refused.stderr and refused.returncode == 2
    few = ["--steps", "4", "--batch", "2", "--probes", "0", "--json", tmp_path / "run.json"]
    done = polybit("train", tiny_llama, *flags, *new, *few)
    assert not done.returncode, done.stderr
    assert set(json.loads((tmp_path / "run.json").read_text())["numbers"]["presets"]) == {"A", "B"}
    notes = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["notes"]
    assert (notes["trained"]["method"], notes["trained"]["schedule"]) == ("plain", "fro")
