"""A new quantizer is one file and one line: command line, library and sweep take it, with what its line says of it.

What spends bits takes it too: tests/contracts/test_new_signal.py.
"""

import json

import pytest

from tests.contracts.grown import grow

FIXED = '''"""Rounding to nearest under another name."""

from polybit.quant.rtn import rtn


def plainly(weight_OI, stats, grid):
    """Codes of one weight."""
    assert stats is not None and grid.zero == "centre"
    return rtn(weight_OI, stats, grid)
'''
NESTED = '''"""Rounding to nearest, whose leading bits are read."""

from polybit.quant.rtn import rtn


def leading(weight_OI, stats, grid, *, widths):
    """Codes of one weight."""
    assert stats is None and grid.zero == "group" and widths == (5, 3)
    return rtn(weight_OI, stats, grid)
'''
LINES = (
    '    "plainly": Quantizer("polybit.quant.plainly:plainly", "no frills", zero="centre", '
    'learned=Learned(2, 0, "best")),\n'
    '    "leading": Quantizer("polybit.quant.leading:leading", "first bits", needs_stats=False, nested=True),\n'
)
LAST = '    "rtn": Quantizer("polybit.quant.rtn:rtn", "rounding to nearest, needs no text", needs_stats=False),\n'
FEW = ("--samples", "4", "--window", "24", "--calibration", "embedded", "--group-size", "16")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """`python` with a package of two more quantizers."""
    files = {"quant/plainly.py": FIXED, "quant/leading.py": NESTED}
    return grow(tmp_path_factory.mktemp("grown"), files, {"quant/table.py": (LAST, LINES)})


@pytest.fixture
def polybit(python, tmp_path):
    """The command line of that package."""

    def run(*words):
        done = python("-m", "polybit", *words, cwd=tmp_path)
        assert not done.returncode, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("verb", ["quantize", "plan"])
def test_help_knows_it(polybit, verb):
    told = " ".join(polybit(verb, "--help").replace("│", " ").split())
    assert "plainly = no frills" in told and "leading = first bits" in told
    assert "all methods but rounding or plainly do" in told


def test_refusals_know_it(python):
    said = python("-m", "polybit", "quantize", "tinychat", "--out", "o", "--method", "magic").stderr
    assert '"plainly"' in said and '"leading"' in said
    said = python(
        "-m", "polybit", "quantize", "tinychat", "--out", "o", "--method", "plainly", "--widths", "8,4"
    ).stderr
    assert "--method nested or leading with --widths" in said
    said = python("-m", "polybit", "quantize", "tinychat", "--out", "o", "--method", "leading", "--bits", "4").stderr
    assert "--method leading makes one file for several widths" in said


def recipe(folder):
    """What a checkpoint says of how it was made."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]["notes"]["recipe"]


def test_quantize_takes_a_fixed_one(polybit, tiny_llama, tmp_path):
    polybit("quantize", tiny_llama, "--out", "q", "--bits", "4", "--method", "plainly", *FEW)
    found = recipe(tmp_path / "q")
    assert (found["method"], found["zero"], found["finish_steps"]) == ("plainly", "centre", 0)
    card = (tmp_path / "q" / "README.md").read_text()
    assert f"polybit quantize {tiny_llama} --out q --bits 4 --method plainly --group-size 16 --samples 4" in card


def test_its_learned_steps_follow_its_line(polybit, tiny_llama, tmp_path):
    polybit("quantize", tiny_llama, "--out", "q", "--bits", "3", "--method", "plainly", "--effort", "best",
            "--no-measure", *FEW)  # fmt: skip
    assert recipe(tmp_path / "q")["finish_steps"] == 2


def test_quantize_takes_a_nested_one(polybit, tiny_llama, tmp_path):
    polybit("quantize", tiny_llama, "--out", "q", "--widths", "5,3", "--method", "leading", "--no-measure", *FEW)
    assert recipe(tmp_path / "q")["widths"] == [5, 3]


def test_the_library_takes_it(python, tiny_llama, tmp_path):
    code = (
        "import polybit\n"
        f"run = polybit.quantize({str(tiny_llama)!r}, out='q', bits=4, method='plainly', samples=4, window=24,\n"
        "    calibration='embedded', group_size=16, measure=False)\n"
        "print(run.config['method'], run.numbers['presets'])\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "plainly ['w4']", done.stderr


def test_sweep_takes_it(polybit, tiny_llama, tmp_path):
    (tmp_path / "grid.toml").write_text(
        "seeds = 1\n[quantize]\nbits = 4\nmethod = ['rtn', 'plainly']\nsamples = 4\nwindow = 24\ngroup-size = 16\n"
        "calibration = 'embedded'\n[eval]\ntext = 'embedded-test'\nwindows = 2\nwindow = 24\nanswers = 0\n"
    )
    assert "method=plainly" in polybit("sweep", tiny_llama, "--grid", "grid.toml", "--out", "s")
