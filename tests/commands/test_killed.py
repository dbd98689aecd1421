"""kill -9 at moments spread over each verb that writes: what was there stays or the new is there, whole; the same
command again ends in the same bytes, and nothing is left beside it."""

import json
import shutil

import pytest

from polybit.cli import main
from polybit.export.table import EXPORTERS
from polybit.hub.directory import MANIFEST, check_manifest
from tests.export.checkpoints import checkpoint
from tests.killed import forked, killed_at, moments

POINTS, SOON = 50, 2
SMALL = ["--steps", "3", "--batch", "2"]
FEW = ["--samples", "4", "--window", "32"]


@pytest.fixture(scope="module")
def room(tiny_llama, tmp_path_factory):
    """Good inputs of the verbs: a checkpoint of whole zero points, pairs, an eval."""
    folder = tmp_path_factory.mktemp("killed")
    checkpoint(folder / "fixed", bits=4, zero="level", nested=False)
    shutil.copytree(tiny_llama, folder / "llama")
    (folder / "prompts.txt").write_text("How are you?\nWhat is 3 plus 4?\nTell me a story.\nWho are you?\nHi!\n")
    (folder / "talk.txt").write_text(
        "\n".join(f"Number {i} is {i * i} in squares, {i + i} in pairs." for i in range(99))
    )
    main(verb_words("pairs", folder, folder / "answers"))
    main(["quantize", str(folder / "llama"), "--out", str(folder / "small"), "--method", "rtn", "--bits", "4",
          "--samples", "4", "--window", "32", "--calibration", "embedded", "--no-measure"])  # fmt: skip
    main(["eval", str(folder / "small"), "--text", "embedded-test", "--windows", "2", "--window", "32", "--answers",
          "2", "--max-tokens", "4", "--json", str(folder / "eval.json")])  # fmt: skip
    return folder


def verb_words(verb, room, out):
    """The command line of a verb."""
    name, _, to = verb.partition(" ")
    words = {
        "export": ["export", room / "fixed", "--to", to, "--windows", "0", "--overwrite"],
        "pairs": ["pairs", room / "llama", "--prompts", room / "prompts.txt", "--precision", "w2", "--max-tokens", "6"],
        "align": ["align", room / "llama", "--pairs", room / "answers", "--precision", "w2", *SMALL],
        "train": [
            "train",
            room / "llama",
            "--presets",
            "A=w8a8,B=w4a8",
            "--data",
            "embedded",
            "--length",
            "32",
            *SMALL,
            *(["--adapter", to, "--rank", "2"] if to else []),
        ],
        "eval": ["eval", room / "small", "--text", "embedded-test", "--windows", "2", "--window", "32", "--answers",
                 "2", "--max-tokens", "4"],
        "quantize": ["quantize", room / "llama", "--widths", "8,4,2", "--calibration", "embedded", *FEW],
        "allocate": ["allocate", room / "llama", "--bits", "4", "--general", "embedded", "--tasks", "arithmetic", *FEW,
                     "--items", "2", "--calibration-samples", "4", "--cache", out.parent.parent / "cache"],
        "mix": ["mix", room / "llama", "--general", "embedded", "--tasks", room / "talk.txt", *FEW, "--verify",
                "--method", "rtn", "--seeds", "1"],
        "report": ["report", room / "small", "--eval", room / "eval.json"],
    }[name]  # fmt: skip
    return [str(word) for word in [*words, "--json" if name in ("mix", "eval") else "--out", out]]


VERBS = [*(f"export {to}" for to in EXPORTERS), "quantize", "allocate", "mix", "pairs", "align", "train", "train lora",
         "eval", "report"]  # fmt: skip
NOW = ("export mlx", "pairs")
# written where nothing is; others keep what is there
ANEW = ("quantize", "allocate", "mix", "pairs", "align", "train", "train lora", "eval")
ENDING = {"report": ".html", "allocate": ".json", "mix": ".json", "eval": ".json"}
CASES = [pytest.param(v, SOON if n == 0 else POINTS, marks=pytest.mark.slow if n or v not in NOW else ())
         for v in VERBS for n in (0, 1)]  # fmt: skip


def content(out):
    """What must be the same after a killed run as without: sizes and digests, the page, the numbers."""
    if out.suffix == ".json":
        found = json.loads(out.read_text())
        return found.get("numbers", found)
    if out.is_file():
        text = out.read_text()
        assert text.rstrip().endswith("</html>")
        return text
    check_manifest(out)
    files = json.loads((out / MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name != "run.json" and not name.endswith("history.json")}


def forget(out):
    """As if the verb had never run."""
    shutil.rmtree(out.parent.parent / "cache", ignore_errors=True)
    out.unlink() if out.is_file() else shutil.rmtree(out)


@pytest.mark.parametrize(("verb", "points"), CASES)
def test_killed_at_any_moment_nothing_is_lost(verb, points, room, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    out = place / f"out{ENDING.get(verb, '')}"
    work = lambda: main(verb_words(verb, room, out))  # noqa: E731
    count = moments(work, tmp_path / "count")
    whole = content(out)
    assert count > 20
    killed = 0
    for point in range(points):
        if verb in ANEW:
            forget(out)
        killed += killed_at(1 + (count - 1) * (2 * point + 1) // (2 * points), work)
        if out.exists():
            assert content(out) == whole
        assert verb in ANEW or out.exists()
        if not out.exists():
            assert forked(work) == 0
        assert content(out) == whole
    assert killed >= points * 0.8, f"{killed} of {points} runs lived until they were killed"
    if verb in ANEW:
        forget(out)
    assert forked(work) == 0  # what the killed ones left is in nobody's way, and goes
    assert content(out) == whole
    assert {path.name for path in place.iterdir()} == {out.name}
