"""`polybit sweep`: grids are read as meant, runs go on where they stopped, tables pair by seed."""

import json

import pytest

from polybit.acts import sweep
from polybit.acts.sweep import summarized
from polybit.cli import main
from polybit.core.runtime import PolybitError
from polybit.options.sweep import SweepCell, SweepGrid, SweepOptions, read_grid

TOML = """
seeds = [3, 5]
baseline = "low method=rtn"
[quantize]
method = ["rtn", "hqq"]
effort = "fast"
[eval]
windows = 2
[variants.low]
bits = 2
[variants.high]
bits = [4, 8]
"""


def grid_of(tmp_path, text, **flags):
    (tmp_path / "grid.toml").write_text(text)
    return read_grid(SweepOptions(out=tmp_path / "o", grid=tmp_path / "grid.toml", **flags))


def test_a_grid_is_the_product_of_its_axes(tmp_path):
    grid = grid_of(tmp_path, TOML)
    names = [cell.name for cell in grid.cells]
    assert names[:2] == ["low method=rtn", "low method=hqq"] and len(names) == 6
    assert "high method=hqq bits=8" in names
    assert grid.cells[0].flags == {"method": "rtn", "effort": "fast", "bits": 2}
    assert grid.seeds == (3, 5) and grid.measured == {"windows": 2}
    assert grid_of(tmp_path, TOML, seeds=1).seeds == (0,)


def test_axes_by_hand(tmp_path):
    grid = read_grid(SweepOptions(out=tmp_path, axis=["bits=3,4", "group-size=32", "asymmetric=true"]))
    assert [c.name for c in grid.cells] == ["bits=3", "bits=4"]
    assert grid.cells[1].flags == {"bits": 4, "group_size": 32, "asymmetric": True} and len(grid.seeds) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing to vary"),
        ("[quantise]\nbits=3", "'quantise'"),
        ("bits = ", "not TOML"),
        ("[quantize]\nbit = [3, 4]", "'bit' is no flag"),
        ("[quantize]\nout = ['a']", "'out' is no flag"),
        ("[quantize]\nbits = [3]\n[eval]\nseed = 1", "'seed' is no flag"),
        ("seeds = 0\n[quantize]\nbits = [3]", "seeds 0"),
        ("seeds = [1, 1]\n[quantize]\nbits = [3]", "seeds"),
        ("baseline = 'x'\n[quantize]\nbits = [3]", "baseline 'x'"),
        ("variants = 3\n[quantize]\nbits = [3]", "[variants]"),
    ],
)
def test_bad_grids_are_one_sentence(tmp_path, text, words):
    with pytest.raises(PolybitError) as caught:
        grid_of(tmp_path, text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("axis", "words"), [("bits=9", "9"), ("bits=four", "four"), ("bits", "--axis"), ("plan=none.json", "no such file")]
)
def test_bad_values_are_refused_before_anything_runs(tiny_llama, tmp_path, monkeypatch, capsys, axis, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["sweep", str(tiny_llama), "--out", "o", "--axis", axis])
    assert caught.value.code not in (0, None)
    assert words in capsys.readouterr().err and not (tmp_path / "o").exists()


def made_up(kl, bits=3.5):
    return {
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "presets": {"w3": {"kl": kl, "perplexity": 5.0, "bits_per_weight": bits}},
    }


def test_differences_are_paired_by_seed():
    grid = SweepGrid((SweepCell("a", {}), SweepCell("b", {})), {}, (0, 1, 2), "a")
    rows = {"a": [made_up(k) for k in (1.0, 2.0, 3.0)], "b": [made_up(k) for k in (1.1, 2.1, 3.1)]}
    first, second = summarized(grid, rows)["rows"]
    assert "difference" not in first and first["numbers"]["kl"]["value"] == pytest.approx(2.0)
    gap = second["difference"]["kl"]
    assert gap["value"] == pytest.approx(0.1) and gap["high"] - gap["low"] < 1e-6 and gap["n"] == 3
    assert second["numbers"]["kl"]["high"] - second["numbers"]["kl"]["low"] > 1


def test_an_interrupted_sweep_goes_on(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []

    def fake(model, cell, grid, seed, options):
        calls.append((cell.name, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made_up(0.1 * seed + cell.flags["bits"])

    monkeypatch.setattr(sweep, "measured_cell", fake)
    command = ["sweep", str(tiny_llama), "--out", "o", "--axis", "bits=3,4", "--seeds", "2"]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 130
    main(command)
    assert len(calls) == 5 and calls[2] == calls[3]
    assert "KL less that of bits=3" in (tmp_path / "o" / "table.md").read_text()
    main([*command, "--axis", "bits=3,4,5"])  # a larger grid keeps what is finished
    assert len(calls) == 7


@pytest.mark.slow
def test_a_real_sweep(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(
        "<|endoftext|>".join(f"Tom saw {n} birds in the {w}." for n in range(99) for w in "abc")
    )
    (tmp_path / "g.toml").write_text(
        "seeds=2\n[quantize]\nbits=4\nmethod=['rtn','gptq']\neffort='fast'\nsamples=4\nwindow=24\ncalibration='t.txt'\n"
        "[eval]\ntext='t.txt'\nwindows=4\nwindow=24\nanswers=0\n"
    )
    main(["sweep", str(tiny_llama), "--out", "o", "--grid", "g.toml"])
    numbers = json.loads((tmp_path / "o" / "sweep.json").read_text())["numbers"]
    assert [row["name"] for row in numbers["rows"]] == ["method=rtn", "method=gptq"]
    assert all(row["numbers"]["kl"]["value"] > 0 for row in numbers["rows"])
    assert not list((tmp_path / "o" / "checkpoints").iterdir())
