"""The doctor: what is there is good, and what is missing comes with a remedy."""

import json
import subprocess
import sys

import pytest

import polybit
from polybit.acts import doctor as act
from polybit.cli import main


def test_a_whole_installation_is_good(tmp_path, capsys):
    main(["doctor", "--where", str(tmp_path), "--json", str(tmp_path / "run.json")])
    shown = capsys.readouterr().out
    checks = {check["what"]: check for check in json.loads((tmp_path / "run.json").read_text())["numbers"]["checks"]}
    assert {"polybit", "torch", "compiled products", "instruction set", "gpu", "free disk", "embedded model"} <= set(
        checks
    )
    assert all(check["state"] != "fault" for check in checks.values()) and "BAD" not in shown
    assert all(check["remedy"] for check in checks.values() if check["state"] == "note")
    assert checks["embedded model"]["found"] == "reads a text"


def test_what_is_broken_is_named_with_a_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(act.cpu, "library", lambda: None)
    monkeypatch.setattr(act, "installed", lambda name: {"transformers": "4.9", "torch": "2.9+cpu"}.get(name))
    monkeypatch.setattr(act, "open_model", lambda name: 1 / 0)
    monkeypatch.setattr(act, "LEAST_DISK", 1e18)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--where", str(tmp_path / "not" / "yet")])
    shown = capsys.readouterr().out
    assert ended.value.code == 1
    for words in ("compiled products  missing", "C++ compiler", "pip install 'transformers>=5.3'", "free some space"):
        assert words in shown
    assert "ZeroDivisionError" in shown and "torch              2.9+cpu" in shown


def test_the_library_has_it_too(tmp_path):
    checks = polybit.doctor(where=str(tmp_path / ("x" * 300) / "y")).numbers["checks"]  # no file system has such a name
    assert next(check for check in checks if check["what"] == "free disk")["state"] != "fault"


def test_completion_is_installed(tmp_path):
    told = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SHELL": "/bin/bash"}
    command = [sys.executable, "-m", "polybit", "--install-completion", "--shell", "bash"]
    done = subprocess.run(command, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scripts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("quantize" in text and "--group-size" in text for text in scripts)
