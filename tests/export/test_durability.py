"""An export that is killed while it writes leaves what was there before, whole, or the new one, whole."""

import os
import signal
import subprocess
import sys
import time

import pytest

from polybit.core.runtime import PolybitError
from polybit.export.table import EXPORTERS
from polybit.hub.directory import check_manifest
from tests.export.checkpoints import checkpoint, float_llama

CODE = """
import sys, time, pathlib
import polybit.acts.export as act
from polybit.options.export import ExportOptions
print("ready", flush=True)
act.export(sys.argv[1], ExportOptions(to=sys.argv[2], out=pathlib.Path(sys.argv[3]), overwrite=True, windows=0))
"""


def start(*words):
    process = subprocess.Popen([sys.executable, "-c", CODE, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("to", EXPORTERS)
def test_killed_at_any_moment_an_export_is_whole_or_not_there(to, tmp_path):
    fixed = checkpoint(tmp_path / "fixed", bits=4, zero="level", nested=False)
    out = tmp_path / "out"
    began = time.monotonic()
    assert start(fixed, to, out).wait() == 0
    whole = time.monotonic() - began
    for moment in range(10):
        process = start(fixed, to, out)
        time.sleep(whole * moment / 20)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        check_manifest(out)
    assert start(fixed, to, out).wait() == 0  # and what the killed ones left is in nobody's way
    assert {path.name for path in tmp_path.iterdir()} <= {"fixed", "out"}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    import errno

    from polybit.acts.export import export
    from polybit.export.files import WeightFiles
    from polybit.options.export import ExportOptions

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    fixed = checkpoint(tmp_path / "fixed", bits=4, zero="level", nested=False)
    monkeypatch.setattr(WeightFiles, "flush", full)
    with pytest.raises(PolybitError, match="disk or quota is full"):
        export(str(fixed), ExportOptions(to="mlx", out=tmp_path / "out", windows=0))
    assert {path.name for path in tmp_path.iterdir()} == {"fixed"}


@pytest.mark.parametrize("to", ["mlx", "dense"])
def test_layers_that_are_lent_are_exported_as_those_in_memory(to, tmp_path, monkeypatch):
    from polybit.acts import export as act
    from polybit.export import files
    from polybit.hub.load import load_quantized
    from polybit.options.export import ExportOptions

    nested = checkpoint(tmp_path / "nested", model=float_llama(tie_word_embeddings=False), ends=True)
    monkeypatch.setattr(files, "PART_BYTES", 1 << 16)
    numbers = [act.export(str(nested), ExportOptions(to=to, out=tmp_path / "lent", windows=0)).numbers]
    monkeypatch.setattr(act, "opened", lambda path, _: (*load_quantized(path), act.there))
    numbers.append(act.export(str(nested), ExportOptions(to=to, out=tmp_path / "whole", windows=0)).numbers)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors*")} for n in ("lent", "whole"))
    assert one == other and one
    assert [{k: v for k, v in row.items() if k not in ("bytes", "files")} for row in numbers[:1]] == [
        {k: v for k, v in numbers[1].items() if k not in ("bytes", "files")}
    ]


def test_a_difference_that_memory_cannot_measure_is_said(tmp_path, monkeypatch, capsys):
    from polybit.acts import export as act
    from polybit.options.export import ExportOptions

    fixed = checkpoint(tmp_path / "fixed", bits=4, zero="level", nested=False)
    monkeypatch.setattr(act, "fits", lambda size, _: size < 1000)
    numbers = act.export(str(fixed), ExportOptions(to="dense", out=tmp_path / "out", windows=2)).numbers
    assert numbers["difference"]["differing"] and "measured" not in numbers
    assert "is not measured on text: the weights of both, decoded, would take" in capsys.readouterr().err
