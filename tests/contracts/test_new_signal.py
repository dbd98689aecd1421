"""A new signal, and a new quantizer, is one file and one table line: whatever spends bits offers and takes it.

The tests run a copy of the package (links to its files) to which just that was added.
"""

import json

import pytest

from tests.contracts.grown import grow

SIGNAL = '''"""How far the codes are from the weight: no text is read."""

from polybit.compress.blocks import run_blocks
from polybit.measure.sensitivity import BlockReading


def distance(model, probes, targets, candidates, *, calibration=(), only=None, seed=0, **where):
    """The squared distance of each candidate, the same for every item."""
    for block in run_blocks(model, [probes[0].ids[0]], targets, references=False, **where):
        reading = BlockReading(block.index)
        for target in block.targets:
            weight_OI = target.weight_OI(model)
            for width, tried_OI in candidates(target, weight_OI, None).items():
                for probe in probes:
                    tokens_N = reading.tokens[probe.name] = sum((c[:, 1:].sum(1).tolist() for c in probe.counted), [])
                    value_N = [float((tried_OI - weight_OI).square().sum()) * n for n in tokens_N]
                    for table in (reading.kl, reading.nll):
                        table.setdefault(probe.name, {}).setdefault(target.name, {})[width] = value_N
        block.finish()
        if only is None or block.index in only:
            yield reading
'''
QUANTIZER = '''"""Rounding to nearest under another name."""

from polybit.quant.rtn import rtn


def plainly(weight_OI, stats, grid):
    """Codes of one weight."""
    assert stats is None and grid.zero in ("group", "centre", "level")
    return rtn(weight_OI, stats, grid)
'''
LINES = {  # table -> (the line before, the new line)
    "measure/table.py": (
        "SIGNALS: dict[str, HarmSignal] = {\n",
        '    "distance": HarmSignal("polybit.measure.distance:distance", "how far the codes are"),\n',
    ),
    "quant/table.py": (
        "QUANTIZERS: dict[str, Quantizer] = {\n",
        '    "plainly": Quantizer("polybit.quant.plainly:plainly", "no frills", needs_stats=False),\n',
    ),
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """`polybit` of a package with a file and a line more, twice; gives the finished process."""
    files = {"measure/distance.py": SIGNAL, "quant/plainly.py": QUANTIZER}
    python = grow(tmp_path_factory.mktemp("grown"), files, LINES)
    return lambda *words, **kwargs: python("-m", "polybit", *words, **kwargs)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a general text and a task."""
    folder = tmp_path_factory.mktemp("texts")
    stories = [f"Tom went to the {place} with {n} friends." for n in range(90) for place in ("sea", "zoo")]
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."} for a in range(9) for b in range(9)]
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories))
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def help_of(done):
    return " ".join(done.stdout.replace("│", " ").split())


def good(done):
    assert not done.returncode, done.stderr
    return done.stdout


def allocated(grown, texts, model, *more):
    """The run of an allocation with little text."""
    words = ["allocate", model, "--bits", "3.6", "--general", "stories.txt", "--tasks", "sums.jsonl", "--samples", "2"]
    words += ["--items", "6", "--calibration-samples", "2", "--window", "32", "--group-size", "32", "--widths", "2,3,4"]
    good(grown(*words, "--json", "run.json", *more, cwd=texts))
    return json.loads((texts / "run.json").read_text())


def test_help_and_refusals_know_the_signal(grown):
    assert "distance = how far the codes are" in help_of(grown("allocate", "--help"))
    assert '"distance"' in grown("allocate", "x", "--bits", "3", "--sensitivity", "magic").stderr


def test_allocate_takes_the_signal(grown, texts, tiny_llama):
    run = allocated(grown, texts, tiny_llama, "--sensitivity", "distance", "--method", "rtn")
    assert run["config"]["sensitivity"] == run["numbers"]["cost"]["how"] == "distance"
    assert (texts / "plan.json").is_file()


@pytest.mark.parametrize("verb", ["allocate", "mix", "columns"])
def test_help_knows_the_quantizer(grown, verb):
    assert "plainly = no frills" in help_of(grown(verb, "--help"))


def test_allocate_takes_the_quantizer(grown, texts, tiny_llama):
    assert allocated(grown, texts, tiny_llama, "--method", "plainly")["config"]["method"] == "plainly"


def test_mix_takes_the_quantizer(grown, texts, tiny_llama):
    words = ["mix", tiny_llama, "--general", "stories.txt", "--tasks", "sums.jsonl", "--window", "24", "--samples", "6"]
    assert "regret of literal" in good(grown(*words, "--verify", "--seeds", "1", "--method", "plainly", cwd=texts))


def test_columns_takes_the_quantizer(grown, texts, tiny_llama):
    words = ["columns", tiny_llama, "--bits", "3", "--block", "32", "--group-size", "32", "--out", "p.json"]
    words += ["--calibration", "stories.txt", "--samples", "4", "--window", "24", "--method", "plainly"]
    assert "KL on held-out windows" in good(grown(*words, cwd=texts))


def test_sweep_takes_the_quantizer(grown, texts, tiny_llama):
    (texts / "grid.toml").write_text(
        "seeds=1\n[quantize]\nbits=4\nmethod=['plainly','rtn']\nsamples=2\nwindow=24\ncalibration='stories.txt'\n"
        "[eval]\ntext='stories.txt'\nwindows=2\nwindow=24\nanswers=0\n"
    )
    good(grown("sweep", tiny_llama, "--out", "swept", "--grid", "grid.toml", cwd=texts))
    rows = json.loads((texts / "swept" / "sweep.json").read_text())["numbers"]["rows"]
    assert [row["name"] for row in rows] == ["method=plainly", "method=rtn"]
    assert rows[0]["per_seed"] == rows[1]["per_seed"]
