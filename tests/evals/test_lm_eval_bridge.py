"""The bridge to lm-eval: on the same items and the same model its scores are those of lm-eval's own model class."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.hub.lm import LocalLM
from polybit.hub.load import load
from tests.evals.toy import CHOICE, GENERATE, ROLLING

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

WORDS = ["Ann has 3 red pens.", "The ship Veteak sailed from Chaiteand in 1742.", "My favorite animal is horse."]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three small tasks on made-up items, with texts longer than the model reads."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{WORDS[n % 3]} Question {n}? " * (1 + 60 * (n == 5)), "answer": n % 3,
         "text": WORDS[n % 3] * (1 + 150 * (n == 4)), "choices": ["Ann", "horse and cart", f"the {n} pens"]}
        for n in range(1, 17)
    ]  # fmt: skip
    data = folder / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("toy_choice", CHOICE), ("toy_rolling", ROLLING), ("toy_generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data))
    return folder


@pytest.fixture(scope="module")
def lm():
    from polybit.hub.tiny import path

    return LocalLM(*load(str(path())))


@pytest.mark.parametrize("task", ["toy_choice", "toy_rolling", "toy_generate"])
def test_scores_are_those_of_lm_eval(tasks, lm, task):
    from lm_eval.models.huggingface import HFLM

    from polybit.evals.lm_eval_bridge import BridgeLM, evaluate_tasks, figures

    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4, device="cpu")
    wanted = evaluate_tasks(theirs, [task], include=tasks)
    found = evaluate_tasks(BridgeLM(lm), [task], include=tasks)
    assert figures(found["results"][task]) == pytest.approx(figures(wanted["results"][task]), rel=1e-5)
    for ours, them in zip(found["samples"][task], wanted["samples"][task], strict=True):
        if task == "toy_rolling":
            continue
        flat = [[reply[0] for reply in row["filtered_resps"]] for row in (ours, them)]
        if task == "toy_generate":
            assert flat[0] == flat[1]
        else:
            assert flat[0] == pytest.approx(flat[1], abs=1e-3)


def test_presets_are_compared_and_unknown_tasks_refused(tasks, lm):
    from polybit.evals.lm_eval_bridge import compare_tasks

    found = compare_tasks(lm, lm, [None], ["toy_choice"], include=tasks, limit=10)["toy_choice"]
    row = found["presets"]["as loaded"]["acc"]
    assert found["n"] == 10 and row["value"] == found["reference"]["acc"]
    assert row["flips"]["value"] == 0 and row["difference"]["value"] == 0
    with pytest.raises(PolybitError, match="does not know the task 'nonsense'"):
        compare_tasks(lm, lm, [None], ["nonsense"], include=tasks)
