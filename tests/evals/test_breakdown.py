"""The four answers around a flip, and long conversations, with models whose next token follows a rule."""

from types import SimpleNamespace

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.evals.breakdown import branch, flip_breakdown
from polybit.evals.conversation import converse, fit, history
from polybit.evals.drift import drift, repeated_share, scripts_from
from polybit.evals.readings import PairedAnswers
from polybit.hub.lm import LocalLM
from tests.evals.models import Uniform
from tests.evals.tiny import tokenizer


class Steps(Uniform):
    """Says last token + `step`, but `odd` after token `at`; ends with token 2 after `end`."""

    def __init__(self, step=1, at=None, odd=None, end=None):
        super().__init__()
        self.step, self.at, self.odd, self.end = step, at, odd, end

    def forward(self, input_ids, past_key_values=None, use_cache=False, attention_mask=None):
        following = (input_ids + self.step).clamp(max=95)
        if self.at is not None:
            following = torch.where(input_ids == self.at, self.odd, following)
        if self.end is not None:
            following = torch.where(input_ids == self.end, 2, following)
        logits = 9.0 * torch.nn.functional.one_hot(following, 96)
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


def lm(**rule):
    return LocalLM(Steps(**rule), tokenizer())


def answers(model, prompts, n=8):
    return model.generate_tokens(prompts, max_tokens=n)


def breakdown(reference, quantized, prompts, n=8):
    theirs, ours = answers(reference, prompts, n), answers(quantized, prompts, n)
    return flip_breakdown(reference, quantized, None, PairedAnswers(prompts, theirs, ours), max_tokens=n)


def test_a_quantized_model_that_slips_once_does_no_harm_afterwards():
    """It counts like the float model but says 40 after 14: the flip is all, the continuation is blameless."""
    found = breakdown(lm(), lm(at=14, odd=40), [[10], [11], [60]])
    arms = {name: row["damage"]["value"] for name, row in found["arms"].items()}
    assert found["n"] == 2, "the third never reaches 14"
    assert arms["float"] == arms["continuation"] == 0 and arms["forced_flip"] == arms["quantized"] > 0.5
    assert found["forced_minus_continuation"]["value"] > 0.5


def test_a_quantized_model_that_counts_otherwise_does_all_the_harm_by_itself():
    """The float model forced to say one odd token says 5, and is back on its way from there."""
    back = breakdown(lm(at=5, odd=12), lm(step=2, at=10, odd=5), [[10]], n=12)
    arms = {name: row["damage"]["value"] for name, row in back["arms"].items()}
    assert arms["forced_flip"] < arms["continuation"] and arms["forced_flip"] < arms["quantized"]
    assert back["arms"]["float"]["tail_nats"]["value"] > back["arms"]["quantized"]["tail_nats"]["value"]


def test_branches_keep_their_start_and_their_length():
    model = lm(end=20)
    found = branch(model, [[10], [10], [10]], [[11, 12], [50, 2], [11] * 6], 6, label="x")
    assert found[0] == [11, 12, 13, 14, 15, 16] and found[1] == [50, 2] and found[2] == [11] * 6
    assert branch(model, [[10]], [[17]], 6, label="x") == [[17, 18, 19, 20, 2]]


def test_equal_models_have_no_breakdown():
    assert breakdown(lm(), lm(), [[10], [11]]) is None


def test_history_and_fit():
    assert history(["a", "b", "c"], ["x"]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "b"},
    ]
    model = lm()
    model.max_length = 80
    ids, dropped = fit(model, history(["first question", "second", "third"], ["x" * 9, "y" * 9]), 10)
    said = model.tokenizer.decode(ids)
    assert dropped == 1 and len(ids) <= 70 and "second" in said and "first" not in said
    ids, dropped = fit(model, history(["q" * 80], []), 10)
    assert dropped == 0 and len(ids) == 70, "a single message that is too long loses its beginning"


def test_own_and_given_history():
    model = lm(step=1)
    scripts = [["ab", "cd"], ["ef"]]
    own = converse(model, scripts, max_tokens=3)
    assert [len(texts) for texts in own.texts] == [2, 1]
    given = converse(model, scripts, max_tokens=3, given=[["ZZZ", "Q"], ["W"]])
    assert "ZZZ" in model.tokenizer.decode(given.prompts[0][1]) and given.prompts[0][0] == own.prompts[0][0]


def test_drift_of_equal_models_is_nothing_and_of_others_something():
    scripts = [[f"say {n}{turn}" for turn in range(8)] for n in range(4)]
    same = drift(lm(), lm(), [None], scripts, max_tokens=4)["presets"]["as loaded"]
    assert all(row["value"] == 1 for row in same["own"]["rouge_l"]) and same["flips_change"]["value"] == 0
    assert same["own"]["change"]["rouge_l"]["value"] == 0
    other = drift(lm(), lm(step=3), [None], scripts, max_tokens=4)
    row = other["presets"]["as loaded"]
    assert row["own"]["same"][0]["value"] == 0 and row["flips"][0]["value"] == 1 and row["flips"][0]["n"] == 4
    assert len(row["given"]["prefix"]) == other["turns"] == 8


def test_repetition_counts_runs_seen_before():
    seen: set = set()
    assert repeated_share([1, 2, 3, 4, 5], seen) == 0
    assert repeated_share([1, 2, 3, 4, 9], seen) == 0.5
    assert repeated_share([7] * 10, set()) == 6 / 7 and repeated_share([1, 2], set()) == 0


def test_scripts_are_filled_from_several_conversations():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "b"}]
    assert scripts_from([talk, talk, talk], 4) == [["a", "b", "a", "b"]]
    with pytest.raises(PolybitError, match="hold 2 user messages"):
        scripts_from([talk], 20)
    with pytest.raises(PolybitError, match="different lengths"):
        drift(lm(), lm(), [None], [["a"], ["a", "b"]], max_tokens=2)
