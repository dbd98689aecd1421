"""Every example runs as its head comment says."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_examples_are_short():
    assert EXAMPLES
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) < 60 and "Run" in text.split('"""')[1], path.name


def test_quantize_a_matrix(capsys):
    runpy.run_path(str(EXAMPLES[[p.name for p in EXAMPLES].index("quantize_a_matrix.py")]))
    lines = capsys.readouterr().out.splitlines()
    errors = [float(line.rsplit(" ", 1)[1]) for line in lines[1:]]
    assert errors == sorted(errors), "fewer bits, more error"


@pytest.mark.slow
def test_switch_width(tmp_path):
    from polybit.cli import main

    out = tmp_path / "tinychat"
    main(["quantize", "tinychat", "--out", str(out), "--effort", "fast", "--samples", "8", "--no-measure"])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES[0].parent / "switch_width.py"), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("w8:") == 1 and "now at w8" in done.stdout
