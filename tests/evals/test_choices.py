"""Multiple choice and GSM8K: every form of row, gates for every scorer, ties, pairing, worked examples, real files."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from polybit.core.runtime import PolybitError
from polybit.evals.choices import ChoiceSet, chance, compare_choices, decide, gate, ignorant, knowing, paired, score
from polybit.evals.choices_data import ChoiceItem, Sum, ask, examples, pairs, read_items, texts, worked
from polybit.evals.scoring import last_number
from polybit.hub.lm import LocalLM, LogLik
from tests.evals.models import Uniform
from tests.evals.tiny import tokenizer

DATA = Path(os.environ.get("POLYBIT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def adapters(text, right):
    """A row as LLM-Adapters writes it."""
    return {"instruction": f"Please {text}\n\nAnswer format: {right}/other", "input": "", "answer": right}


AB = [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]
ROWS = {
    "csqa": {"answerKey": "B", "question": {"stem": "Where?", "choices": AB}},
    "arc": {"question": "Where?", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": "2"},
    "openbookqa": {"question_stem": "Where?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
    "mmlu hub": {"question": "Where?", "choices": ["x", "y"], "answer": 1, "subject": "places"},
    "olmes": {"ind": 1, "query": "He went", "choices": ["x", "y"], "gold": 1},
    "hellaswag": {"activity_label": "W", "ctx_a": "He.", "ctx_b": "he", "endings": ["x [a]", "y"], "label": "1"},
    "piqa": {"goal": "Go", "sol1": "x", "sol2": "y", "label": 1},
    "boolq": {"passage": "P.", "question": "is it", "answer": True},
    "siqa": {"context": "C.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"},
    "winogrande": {"sentence": "Al saw Bo when _ ran.", "option1": "Al", "option2": "Bo", "answer": "2"},
    "generic": {"question": "Where?", "choices": ["x", "y"], "label": 1},
    "adapters": adapters("choose the correct answer to the question: Where?\n\nAnswer1: x Answer2: y", "answer2"),
    "adapters piqa": adapters("choose the solution to the question: G\n\nSolution1: x Solution2: y", "solution2"),
    "adapters boolq": adapters("answer the following question with true or false, question: is it?", "true"),
    "gsm8k": {"question": "1+1?", "answer": "So 1+1=2\n#### 2"},
}  # fmt: skip


def write(tmp_path, rows, name="items.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def choice_set(n=30, seed=0, **rest):
    rng = random.Random(seed)
    items = [ChoiceItem(str(i), f"Q{i}?", tuple(f"{w}{i}" for w in "abcd"), rng.randrange(4), **rest) for i in range(n)]
    return ChoiceSet("made", items)


@pytest.mark.parametrize("name", ROWS)
def test_every_form_is_read(name, tmp_path):
    [item] = read_items(write(tmp_path, [ROWS[name]]))
    if isinstance(item, Sum):
        assert name == "gsm8k" and item.answer.endswith("#### 2")
        return
    assert item.gold == 1 and len(item.answers) >= 2
    assert worked(item).endswith(
        {"boolq": " yes", "adapters boolq": " yes", "winogrande": " ran.", "mmlu hub": " B"}.get(name, " y")
    )
    assert item.letters == (name == "mmlu hub")


@pytest.mark.parametrize("name", ROWS)
def test_gates(name, tmp_path):
    """A model that knows nothing scores 0, one that knows all 100 %, and right answers of other items score chance."""
    rows = [json.loads(json.dumps(ROWS[name]).replace("Where", f"Where{n}").replace("1+1=2", f"1+{n}={n + 1}")
                       .replace("#### 2", f"#### {n + 1}")) for n in range(40)]  # fmt: skip
    for row in rows[::2]:
        if name == "generic":
            row["label"] = 0
        elif name == "arc":
            row["answerKey"] = "1"
    asked = ChoiceSet(name, read_items(write(tmp_path, rows)))
    gate(asked)
    rng = np.random.default_rng(0)
    for metric in score(ignorant(asked), asked):
        assert score(knowing(asked), asked)[metric].all() and not score(ignorant(asked), asked)[metric].any()
    turned = np.mean([score(knowing(asked, rng.permutation(40)), asked)[metric].mean() for _ in range(20)])
    if name in ("generic", "arc"):
        assert abs(turned - chance(asked)) < 0.05
    elif name == "gsm8k":
        assert turned < 0.1


def test_shuffled_gold_is_chance():
    asked = choice_set(200)
    rng = np.random.default_rng(1)
    for metric in ("acc", "acc_norm"):
        found = np.mean([score(knowing(asked, rng.permutation(200)), asked)[metric].mean() for _ in range(20)])
        assert abs(found - 0.25) < 0.02


def test_a_damaged_set_does_not_pass_the_gate():
    same = ChoiceItem("x", "Q?", ("a", "a"), 0)  # nothing to choose: a model without knowledge would be right
    with pytest.raises(PolybitError, match=r"knows nothing scores 100\.0%"):
        gate(ChoiceSet("bad", [same]))


def test_acc_and_acc_norm():
    item = ChoiceItem("x", "Q?", ("aa", "bbbbbbbb"), 1)
    replies = [LogLik(-3.0, 1, False), LogLik(-4.0, 1, False)]
    assert decide(item, replies) == {"acc": False, "acc_norm": True}
    assert decide(item, [LogLik(-3.0, 1, False)] * 2)["acc"] is False, "a tie is no knowledge"
    double = ChoiceItem("x", "Q?", ("a", "b", "b"), 1)
    assert decide(double, [LogLik(v, 1, False) for v in (-5.0, -1.0, -1.0)])["acc"], "the same text twice is one answer"


def test_letters_and_cloze():
    item = ChoiceItem("x", "Q?", ("red", "blue"), 1, passage="P.")
    assert ask(item, "letters") == "P.\nQ?\nA. red\nB. blue\nAnswer:" and texts(item, "letters") == ("A", "B")
    assert pairs(item)[1] == ("P.\nQuestion: Q?\nAnswer:", " blue")
    running = ChoiceItem("x", "He went", ("home", "away"), 0, running=True)
    assert pairs(running, form="letters")[0] == ("He went", " home")
    grande = ChoiceItem("x", "", ("ran.", "ran."), 1, running=True, prefixes=("when Al", "when Bo"))
    assert pairs(grande, "E\n\n") == [("E\n\nwhen Al", " ran."), ("E\n\nwhen Bo", " ran.")]


def test_worked_examples_come_from_the_same_subject():
    shown = [ChoiceItem(str(i), f"S{i}?", ("a", "b"), 1, group="x" if i % 2 else "y", letters=True) for i in range(6)]
    text = examples(shown, 2, "x")
    assert text.startswith("The following are multiple choice questions (with answers) about x.\n\nS1?")
    assert text.count("Answer: B\n\n") == 2 and "S3?" in text and "S2?" not in text
    with pytest.raises(PolybitError, match="fewer than --shots 4"):
        examples(shown, 4, "x")


def test_sums():
    class Says:
        def generate(self, prompts, *, max_tokens, stop):
            assert stop and all(p.endswith("Answer:") for p in prompts)
            return ["1+1=2 #### 2", "it is 1,003.", "nothing"]

    items = [Sum("a", "?", "#### 2"), Sum("b", "?", "#### 1003"), Sum("c", "?", "#### 5")]
    found = score(Says(), ChoiceSet("gsm8k", items))
    assert found["exact"].tolist() == [True, False, False] and found["flexible"].tolist() == [True, True, False]
    assert last_number("x -3.50 y") == -3.5 and last_number("none") is None


def test_paired_numbers():
    was, now = np.array([True] * 10 + [False] * 10), np.array([True] * 5 + [False] * 10 + [True] * 5)
    found = paired(was, now, seed=0)
    assert found["value"] == 0.5 and found["difference"]["value"] == 0, "the same score"
    assert found["flips"]["value"] == 0.5 and found["correct_to_wrong"]["value"] == 0.25, (
        "and half of the answers changed"
    )


def test_compare_on_a_model():
    lm, other = (LocalLM(Uniform(), tokenizer()) for _ in range(2))
    asked = choice_set(12)
    assert not compare_choices(lm, lm, [None], [asked])["made"]["presets"], "one model is read once"
    found = compare_choices(lm, other, [None], [asked])["made"]
    assert found["chance"] == 0.25 and found["presets"]["as loaded"]["acc"]["flips"]["value"] == 0
    assert found["reference"]["acc"]["value"] == 0, "all answers have two or three letters: uniform means ties"


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([{"a": 1}], "no form we know"),
        ([{"question": "?", "choices": ["x", "y"], "answer": 2}], "names choice 2"),
        ([{"question": "?", "choices": ["x"], "answer": 0}], "1 choices"),
        ([{"question": "?", "choices": ["x", " "], "answer": 0}], "with text"),
        ([{"question": "?", "answer": "seven"}], "no ####"),
        ([{"question": "?", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "Z"}], "cannot be read"),
        ([ROWS["gsm8k"], ROWS["generic"]], "mixes"),
    ],
)
def test_bad_rows(rows, word, tmp_path):
    with pytest.raises(PolybitError, match=word):
        read_items(write(tmp_path, rows))


def test_a_directory_of_subjects(tmp_path):
    for name in ("anatomy", "law"):
        (tmp_path / f"{name}_test.csv").write_text('question,choice0,choice1,answer\nWhere?,x,y,1\n"A, b?",x,y,0\n')
    items = read_items(tmp_path, limit=1)
    assert [(item.group, item.gold, item.letters) for item in items] == [("anatomy", 1, True), ("law", 1, True)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolybitError, match=r"without \.csv files"):
        read_items(tmp_path / "empty")


@pytest.mark.skipif(not (DATA / "mmlu").is_dir(), reason="the sets are not here; POLYBIT_DATA names their folder")
def test_the_real_sets_are_read_and_pass_the_gates():
    sizes = {}
    for path in (
        DATA / "mmlu" / "dev",
        DATA / "commonsense_qa" / "dev_rand_split.jsonl",
        DATA / "hellaswag" / "hellaswag_val_1000.jsonl",
        *sorted((DATA / "mc_llm_adapters").glob("*/test.json")),
        DATA / "gsm8k" / "test.jsonl",
    ):
        items = read_items(path)
        gate(ChoiceSet(path.parent.name, items))
        sizes[path.parent.name] = len(items)
    assert sizes["mmlu"] == 285 and len({item.group for item in read_items(DATA / "mmlu" / "dev")}) == 57
    assert {"ARC-Challenge", "ARC-Easy", "boolq", "openbookqa", "piqa", "social_i_qa"} <= sizes.keys()
