"""Attacks raise the loss they say they raise, through true gradients, and touch only what they may."""

from random import Random

import pytest
import torch
from torch import nn

from polybit.core.parts import pick
from polybit.core.runtime import PolybitError
from polybit.data.squad import Answer, Asked
from polybit.robust.cases import Case, allowed_tokens, build_cases
from polybit.robust.edits import edited, worst_edits
from polybit.robust.gradients import Victim, embedding_matrix, nudged
from polybit.robust.swaps import greedy
from polybit.robust.table import ATTACKS, AttackBudget
from tests.robust.models import chat, questions


def cases(n=3, **how):
    return build_cases(chat().tokenizer, *questions(n), **how)


def test_a_suffix_stands_between_text_and_question():
    tokenizer = chat().tokenizer
    asked, answers = questions(3)
    for one, case in zip(asked, cases(count=5), strict=True):
        assert len(case.free) == 5
        assert one.context in tokenizer.decode(case.ids[: case.free[0]])
        assert one.question in tokenizer.decode(case.ids[case.free[-1] + 1 :])
        said = tokenizer.decode(case.answer, skip_special_tokens=True).strip()
        assert said == answers[one.id][0].text and case.answer[-1] == tokenizer.eos_token_id


def test_swaps_spare_every_word_of_question_and_answer():
    tokenizer = chat().tokenizer
    asked, answers = questions(6)
    for one, case in zip(asked, cases(6, place="swap"), strict=True):
        assert case.free
        changed = case.with_tokens([allowed_tokens(tokenizer)[7]] * len(case.free))
        text = tokenizer.decode(changed.ids)
        assert answers[one.id][0].text in text and one.question in text
        assert set(case.free).isdisjoint(range(len(case.ids) - 3, len(case.ids)))


def test_loss_equals_loglik():
    lm = chat()
    row = cases()
    with torch.no_grad():
        ours = Victim(lm, [None]).losses(row)
    for case, loss in zip(row, ours, strict=True):
        logp = lm.logits(torch.tensor([[*case.ids, *case.answer]]))[0].log_softmax(-1)
        literal = -sum(float(logp[len(case.ids) - 1 + n, token]) for n, token in enumerate(case.answer)) / len(
            case.answer
        )
        assert float(loss) == pytest.approx(literal, abs=1e-4)


@pytest.mark.parametrize("preset", ["w8", "w3", None])
def test_gradient_equals_a_finite_difference(preset):
    """Through dequantized weights, at every width."""
    target = Victim(chat(), [preset])
    row = cases(2)
    with target.at(preset):
        _, gradient = target.gradient(row)
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
        ends = []
        for sign in (1, -1):
            with torch.no_grad(), nudged(target.lm.model, sign * 1e-3 * direction):
                ends.append(target.nll(row).sum())
    assert float((ends[0] - ends[1]) / 2e-3) == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=1e-3)


def test_gains_are_first_order_changes_of_the_loss():
    target = Victim(chat(), ["w6"])
    row = cases(1)
    _, (gain,) = target.gains(row)
    with target.at("w6"):
        matrix = embedding_matrix(target.lm.model)
        _, gradient = target.gradient(row)
    position, token = row[0].free[2], 77
    literal = gradient[0, position] @ (matrix[token] - matrix[row[0].ids[position]])
    assert float(gain[2, token]) == pytest.approx(float(literal), rel=1e-3, abs=1e-6)


def test_several_widths_are_averaged():
    row = cases(2)
    each = [Victim(chat(), [preset]).gains(row) for preset in ("w8", "w3")]
    both = Victim(chat(), ["w8", "w3"]).gains(row)
    assert torch.allclose(both[0], (each[0][0] + each[1][0]) / 2, atol=1e-5)
    for n in range(2):
        assert torch.allclose(both[1][n], (each[0][1][n] + each[1][1][n]) / 2, atol=1e-5)


@pytest.mark.parametrize("method", ["greedy", "hotflip", "random"])
def test_an_attack_raises_the_loss_and_only_free_tokens_change(method):
    target = Victim(chat(), ["w4"])
    start = cases(3)
    allowed = allowed_tokens(chat().tokenizer)
    attack, budget = ATTACKS[method], AttackBudget(steps=3, tries=6)
    found = attack(target, start, budget, allowed, seed=1)
    assert bool((target.losses(found) >= target.losses(start) - 1e-4).all())
    if method == "greedy":
        assert float((target.losses(found) - target.losses(start)).mean()) > 0.1
        assert found == attack(target, start, budget, allowed, seed=1)
    for before, after in zip(start, found, strict=True):
        kept = [n for n in range(len(before.ids)) if n not in before.free]
        assert [before.ids[n] for n in kept] == [after.ids[n] for n in kept]
        assert set(after.tokens) <= set(allowed)


def test_a_budget_of_changes_is_kept():
    start = cases(2, place="swap")
    budget = AttackBudget(steps=4, tries=5, changes=2)
    found = greedy(Victim(chat(), ["w8"]), start, budget, allowed_tokens(chat().tokenizer))
    for before, after in zip(start, found, strict=True):
        assert 1 <= sum(a != b for a, b in zip(before.tokens, after.tokens, strict=True)) <= 2


def test_a_text_without_a_free_token_stays():
    fixed = Case("x", cases(1)[0].ids, (), cases(1)[0].answer)
    assert greedy(Victim(chat(), ["w8"]), [fixed], AttackBudget(steps=1), [5]) == [fixed]


def test_edits_spare_the_answer_and_the_worst_is_chosen():
    asked, answers = questions(4)
    for kind in (name for name, part in ATTACKS.items() if part.changes == "words"):
        for one in asked:
            changed = edited(one, answers[one.id], kind, count=3, rng=Random(1))
            assert changed.context != one.context and answers[one.id][0].text in changed.context
            assert changed.question == one.question
    worst = worst_edits(lambda all_: [len(one.context) for one in all_], asked, answers, "words", tries=8)
    for one, found in zip(asked, worst, strict=True):
        assert len(found.context) >= len(one.context)


class Deaf(nn.Module):
    """Answers without looking at embeddings."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        with torch.no_grad():
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def test_models_without_gradients_and_bad_settings_are_refused():
    from polybit.hub.lm import LocalLM

    deaf = LocalLM(Deaf(chat().model), chat().tokenizer)
    with pytest.raises(PolybitError, match="no gradient reaches the input"):
        Victim(deaf, [None]).gains(cases(1))
    with pytest.raises(PolybitError, match="shows no input embeddings"):
        embedding_matrix(nn.Linear(2, 2))
    with pytest.raises(PolybitError, match="at least one precision"):
        Victim(chat(), [])
    with pytest.raises(PolybitError, match="choose greedy"):
        pick(ATTACKS, "magic", "--method")
    with pytest.raises(PolybitError, match="give 1 or more"):
        AttackBudget(steps=0)
    with pytest.raises(PolybitError, match="none of the questions"):
        build_cases(chat().tokenizer, [Asked("a", "b", "c")], {"a": ()})
    with pytest.raises(PolybitError, match="never cut"):
        build_cases(chat().tokenizer, [Asked("a", "b", "c")], {"a": (Answer("b"),)}, room=5)
