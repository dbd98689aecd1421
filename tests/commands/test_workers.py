"""Verbs with two workers: the numbers and the bytes of one process."""

import hashlib
import json
from importlib.util import find_spec

import pytest

from polybit.cli import main
from tests.evals.toy import CHOICE

SMALL = ["--samples", "8", "--window", "64", "--no-measure", "--seed", "3"]
TIMES = ("seconds", "cpu_seconds", "kept_at", "measured_now", "peak_memory_bytes", "predictions")
WAYS = [["--workers", "2"], ["--workers", "2", "--ray", "local"]]

pytestmark = pytest.mark.slow


def lasting(value):
    """What a run found, without its times and places."""
    if isinstance(value, dict):
        return {key: lasting(part) for key, part in value.items() if key not in TIMES}
    return [lasting(part) for part in value] if isinstance(value, list) else value


def numbers(path):
    return lasting(json.loads(path.read_text())["numbers"])


def bytes_of(folder):
    files = [path for path in folder.iterdir() if path.name not in ("README.md", "run.json", ".lock")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("codes", [["--bits", "3", "--method", "gptq"], ["--widths", "4,2", "--effort", "fast"]])
def test_quantize(tmp_path, codes):
    for name, way in (("one", []), ("two", WAYS[0]), ("ray", WAYS[1])):
        main(["quantize", "tinychat", *SMALL, *codes, "--out", str(tmp_path / name), *way])
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two") == bytes_of(tmp_path / "ray")


@pytest.mark.parametrize("way", WAYS)
def test_suites_and_pairs(tmp_path, way, capsys):
    main(["quantize", "tinychat", *SMALL, "--widths", "4,3", "--effort", "fast", "--out", str(tmp_path / "q")])
    rows = [{"question": f"What is {n}?", "choices": [f"{n}", "no"], "answer": 0} for n in range(260)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy_choice.yaml").write_text(CHOICE.format(name="toy_choice", data=tmp_path / "numbers.jsonl"))
    words = ["eval", str(tmp_path / "q"), "--windows", "2", "--answers", "34", "--max-tokens", "6", "--breakdown"]
    words += ["--precision", "w3"]
    words += ["--choices", str(tmp_path / "numbers.jsonl"), "--squad", "embedded", "--squad-items", "4"]
    words += ["--talk", "2", "--talk-count", "2", "--choice-items", "260"]
    words += ["--lm-eval", "toy_choice", "--lm-eval-path", str(tmp_path)] if find_spec("lm_eval") else []
    for name, more in (("one", []), ("two", way)):
        main([*words, "--json", str(tmp_path / f"{name}.json"), *more])
        main(["pairs", "tinychat", "--prompts", "embedded", "--limit", "20", "--shard", "7", "--max-tokens", "12",
              "--precision", "w3", "--out", str(tmp_path / name), *more])  # fmt: skip
    one = numbers(tmp_path / "one.json")
    assert one["choices"]["numbers"]["n"] == 260 and {"talk", "squad"} < one.keys()
    assert one == numbers(tmp_path / "two.json")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert "in this process" not in capsys.readouterr().err


@pytest.mark.parametrize("way", WAYS)
def test_eval_judge_mix_and_allocate(tmp_path, way):
    main(["quantize", "tinychat", *SMALL, "--widths", "4,3", "--effort", "fast", "--out", str(tmp_path / "q")])
    questions = tmp_path / "q.jsonl"
    rows = [{"question_id": n, "category": "a", "turns": [f"What is {n} plus 2?", "Who are you?"]} for n in range(20)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    story = tmp_path / "story.txt"
    story.write_text(
        "\n\n".join(f"Once there were {n} birds, and one of them could count to {n + 1}." for n in range(400))
    )
    words = {
        "eval": ["eval", str(tmp_path / "q"), "--windows", "8", "--answers", "4", "--tasks", "reading", "--items", "8"],
        "mix": ["mix", "tinychat", "--general", str(story), "--tasks", "embedded", "--samples", "4", "--verify"],
        "allocate": ["allocate", "tinychat", "--bits", "3.5", "--samples", "4", "--items", "4", "--refine", "8"],
    }
    words["mix"] += ["--method", "rtn", "--seeds", "2", "--window", "32"]
    words["allocate"] += ["--method", "rtn", "--calibration-samples", "4", "--window", "64"]
    for number, more in enumerate(([], way)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for verb, said in words.items():
            own = ["--cache", str(folder / "cache"), "--out", str(folder / "plan.json")] if verb == "allocate" else []
            main([*said, *own, "--json", str(folder / f"{verb}.json"), *more])
        main(["judge", str(tmp_path / "q"), "--questions", str(questions), "--out", str(folder / "judge"), *more])
    for name in ("eval.json", "mix.json", "allocate.json", "judge/run.json"):
        assert numbers(tmp_path / "0" / name) == numbers(tmp_path / "1" / name), name
