"""The command line: quick help, TOML defaults, one sentence and a non-zero status for every mistake."""

import resource
import subprocess
import sys

import pytest

from polybit.cli import COMMANDS, main


def refused(capsys, *tokens) -> str:
    """Run a command that must fail; its one sentence."""
    with pytest.raises(SystemExit) as caught:
        main([str(t) for t in tokens])
    assert caught.value.code not in (0, None)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    return " ".join((printed.err + printed.out).split())


def test_help_is_quick_and_lists_every_verb():
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "polybit", "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(verb in done.stdout for verb in COMMANDS)
    # 0.3 CPU seconds is the aim; the best of three leaves room for a busy machine
    assert min(times) < 0.6, times


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help(verb, capsys):
    main([verb, "--help"])
    assert f"polybit {verb}" in capsys.readouterr().out


def test_a_closed_output_is_no_fault():
    command = f"exec {sys.executable} -m polybit --version >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_imports_no_torch():
    code = "import sys\nfrom polybit.cli import main\nmain(['{}', '--help'])\nassert 'torch' not in sys.modules"
    for verb in COMMANDS:
        done = subprocess.run([sys.executable, "-c", code.format(verb)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["quantise"], "quantize"),
        (["quantize"], "MODEL"),
        (["quantize", "tinychat"], "--out"),
        (["quantize", "no/such/place/at/all", "--out", "OUT"], "no/such/place"),
        (["quantize", "EMPTY", "--out", "OUT"], "config.json"),
        (["doctor", "--json", "EMPTY"], "is a directory: give the name of a file"),
        (["quantize", "tinychat", "--out", "OUT", "--bits", "9"], "9"),
        (["quantize", "tinychat", "--out", "OUT", "--bits", "1"], "1"),
        (["quantize", "tinychat", "--out", "OUT", "--bits", "four"], "four"),
        (["quantize", "tinychat", "--out", "OUT", "--widths", "8,9"], "9"),
        (["quantize", "tinychat", "--out", "OUT", "--widths", "8,4", "--bits", "4"], "--widths"),
        (["quantize", "tinychat", "--out", "OUT", "--method", "rtn", "--widths", "8,4"], "nested"),
        (["quantize", "tinychat", "--out", "OUT", "--method", "magic"], "magic"),
        (["quantize", "tinychat", "--out", "OUT", "--group-size", "48"], "48"),
        (["quantize", "tinychat", "--out", "OUT", "--calibration", "no.txt"], "no.txt"),
        (["quantize", "tinychat", "--out", "OUT", "--calibration", "EMPTYTXT"], "empty"),
        (["quantize", "tinychat", "--out", "OUT", "--calibration", "SHORTTXT"], "token"),
        (["quantize", "tinychat", "--out", "OUT", "--calibration", "BINARY"], "UTF-8"),
        (["quantize", "tinychat", "--out", "OUT", "--calibration", "SAME"], "repeats"),
        (["quantize", "tinychat", "--out", "OUT", "--window", "100000"], "--window"),
        (["quantize", "tinychat", "--out", "OUT", "--samples", "0"], "samples"),
        (["quantize", "tinychat", "--out", "AFILE"], "file"),
        (["quantize", "tinychat", "--out", "EMPTY/../NONEMPTY"], "exists"),
        (["eval", "EMPTY"], "config.json"),
        (["eval", "tinychat", "--precision", "w99"], "w99"),
        (["eval", "tinychat", "--tasks", "juggling"], "juggling"),
        (["generate", "tinychat"], "--prompt"),
        (["generate", "tinychat", "--prompt", "  "], "empty"),
        (["generate", "tinychat", "--prompt", "Hi", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "tinychat", "--prompt", "Hi", "--temperature", "-1"], "--temperature"),
        (["generate", "tinychat", "--prompt", "Hi", "--precision", "w3"], "quantize"),
        (["generate", "tinychat", "--prompt", "Hi", "--precision", "w4a8", "--activations", "int8"], "--activations"),
        (["report", "EMPTY"], "EMPTY"),
        (["plan", "EMPTY"], "config.json"),
        (["plan", "tinychat", "--bits", "9"], "9"),
        (["--config", "missing.toml", "plan", "tinychat"], "missing.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_clear_sentence(tokens, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nonempty").mkdir()
    (tmp_path / "nonempty" / "kept.txt").write_text("precious")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "same.txt").write_text("The cat sat.\n" * 4000)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 64)
    places = {
        "OUT": tmp_path / "out",
        "EMPTYTXT": tmp_path / "empty.txt",
        "NONEMPTY": tmp_path / "nonempty",
        "EMPTY/../NONEMPTY": tmp_path / "nonempty",
        "EMPTY": tmp_path / "empty",
        "AFILE": tmp_path / "file",
        "SHORTTXT": tmp_path / "short.txt",
        "BINARY": tmp_path / "binary.txt",
        "SAME": tmp_path / "same.txt",
    }
    sentence = refused(capsys, *(places.get(token, token) for token in tokens))
    expected = str(places.get(words, words))
    assert expected in sentence, sentence
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "nonempty" / "kept.txt").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "a file"


def test_toml_defaults_yield_to_flags(tmp_path, capsys):
    config = tmp_path / "plan.toml"
    config.write_text("[plan]\nbits = 9\n")
    assert "9" in refused(capsys, "--config", config, "plan", "tinychat")
    for text, said in (
        ("[plan]\nbits = ", "TOML"),
        ("[plam]\nbits = 4", "[plam]"),
        ("bits = 4", "'bits'"),
        ("\xff", "TOML"),
    ):
        (tmp_path / "odd.toml").write_bytes(text.encode("latin-1"))
        assert said in refused(capsys, "--config", tmp_path / "odd.toml", "plan", "tinychat")
    main(["--config", str(config), "plan", "tinychat", "--bits", "4", "--no-dry-run"])
    assert "w4" in capsys.readouterr().out
