"""The rows of "Where does a new … go?" that no other file here exercises: a criterion, a set of text, a verb.

Each is added to a copy of the package as house.md says – a file, a line – and seen from the command line.
"""

import json

import pytest

from tests.contracts.grown import grow

FILES = {
    "measure/opposite.py": '''"""The least like the tasks, for those who want to know."""


def opposite(alignment_P, rank_P):
    """The negative alignment."""
    return -alignment_P
''',
    "options/count.py": '''"""What `count` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from polybit.options.checks import at_least


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    """How to count."""

    least: int = 1
    """Layers of fewer weights are not counted."""

    def __post_init__(self) -> None:
        at_least(self, least=1)
''',
    "acts/count.py": '''"""Count the layers of a model."""

from polybit.core.records import Run
from polybit.hub.models import open_model
from polybit.nn.convert import targets
from polybit.options.checks import plain
from polybit.options.count import CountOptions


def count(model: str, options: CountOptions) -> Run:
    """Count what can be quantized."""
    loaded, _ = open_model(model)
    found = [target for target in targets(loaded) if target.size >= options.least]
    return Run("count", {"model": model, **plain(options)}, {"layers": len(found)})
''',
    "commands/count.py": '''"""`polybit count`: count the layers of a model."""

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.count import CountOptions


def count(model: str, /, *, options: Annotated[CountOptions, Parameter(name="*")] = CountOptions(), json: Json = None):
    """Count the layers of MODEL that can be quantized."""
    from polybit.acts.count import count as act

    run = act(model, options)
    print(f"{run.numbers['layers']} layers")
    keep(run, json)
''',
}
LINES = {
    "measure/table.py": (
        "CRITERIA: dict[str, MixtureCriterion] = {\n",
        '    "opposite": MixtureCriterion("polybit.measure.opposite:opposite", "the least like the tasks"),\n',
    ),
    "data/table.py": (
        'EMBEDDED_SETS: dict[str, tuple[Literal["train", "test"], int]] = {\n',
        '    "embedded-other": ("train", 77),\n',
    ),
    "cli.py": (
        "COMMANDS = {\n",
        '    "count": ("polybit.commands.count:count", MEASURE, "Count the layers of a model."),\n',
    ),
    "__init__.py": ("_PUBLIC = {\n", '    "count": "polybit.library",\n'),
    "library.py": (
        'generate = act(GenerateOptions, "polybit.acts.generate:generate", '
        '"Answer a prompt with a model at a chosen width.")\n',
        "from polybit.options.count import CountOptions  # noqa: E402\n\n"
        'count = act(CountOptions, "polybit.acts.count:count", "Count the layers of a model.")\n',
    ),
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """`python ...` with the grown package."""
    return grow(tmp_path_factory.mktemp("grown"), FILES, LINES)


def good(done):
    assert not done.returncode, done.stderr
    return " ".join(done.stdout.replace("│", " ").split())


def test_a_new_criterion_is_offered_and_takes_part(python, tiny_llama, tmp_path):
    assert "opposite = the least like the tasks" in good(python("-m", "polybit", "mix", "--help"))
    (tmp_path / "a.txt").write_text("Tom went to the sea. " * 400)
    (tmp_path / "b.txt").write_text("What is 3 plus 4? It is 7. " * 400)
    record = tmp_path / "mix.json"
    flags = ["--general", tmp_path / "a.txt", "--tasks", tmp_path / "b.txt", "--samples", "4", "--window", "32"]
    good(python("-m", "polybit", "mix", tiny_llama, *flags, "--criterion", "opposite", "--json", record))
    mixture = json.loads(record.read_text())["numbers"]["mixture"]
    assert mixture["criterion"] == "opposite"
    assert mixture["best"]["weights"][str(tmp_path / "a.txt")] == 1.0  # the literal one is always pure task text


def test_a_new_set_of_text_is_read_and_named_in_refusals(python, tiny_llama, tmp_path):
    words = ["-m", "polybit", "quantize", tiny_llama, "--bits", "4", "--method", "gptq", "--samples", "4", "--window"]
    words += ["32", "--no-measure", "--out"]
    good(python(*words, tmp_path / "out", "--calibration", "embedded-other"))
    assert "embedded-other" in python(*words, tmp_path / "o2", "--calibration", "no-such-set").stderr


def test_a_new_verb_is_a_command_and_a_function(python, tiny_llama, tmp_path):
    assert "Count the layers of a model." in good(python("-m", "polybit", "--help"))
    assert "Layers of fewer weights" in good(python("-m", "polybit", "count", "--help"))
    record = tmp_path / "count.json"
    assert good(python("-m", "polybit", "count", tiny_llama, "--json", record)) == "21 layers"
    assert json.loads(record.read_text())["numbers"] == {"layers": 21}
    refused = python("-m", "polybit", "count", tiny_llama, "--least", "0")
    assert refused.returncode == 2 and "--least 0 is not possible" in refused.stderr
    code = (
        f"import polybit; print(polybit.count({str(tiny_llama)!r}, least=5).numbers['layers'], polybit.count.__doc__)"
    )
    assert good(python("-c", code)).startswith("21 Count the layers")
