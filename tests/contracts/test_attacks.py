"""What every attack of the table promises: within its budget, true to its seed, harmful, and gone without a trace."""

from random import Random

import pytest
import torch

from polybit.robust.attackers import Quiz, attacked_prompts
from polybit.robust.cases import allowed_tokens, build_cases
from polybit.robust.gradients import Victim, nudged
from polybit.robust.table import ATTACKS, PLACES, AttackBudget
from polybit.robust.transfer import answer_at_every
from tests.robust.models import chat, questions

BUDGET = AttackBudget(steps=2, tries=6, changes=3, epsilon=0.3)
of = lambda kind: [name for name, part in ATTACKS.items() if part.changes == kind]  # noqa: E731


def test_every_attack_says_what_it_is():
    assert {part.changes for part in ATTACKS.values()} == {"tokens", "words", "embeddings"}
    assert all(part.summary and not part.summary.endswith(".") for part in ATTACKS.values())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", of("tokens"))
def test_tokens(name, place):
    """Never better for the model than before; only so many free tokens change, to allowed ones; the seed decides."""
    victim, allowed = Victim(chat(), ["w4"]), allowed_tokens(chat().tokenizer)
    start = build_cases(chat().tokenizer, *questions(3), place=place, count=3, seed=1)
    found = ATTACKS[name](victim, start, BUDGET, allowed, seed=5)
    assert found == ATTACKS[name](victim, start, BUDGET, allowed, seed=5)
    for before, after in zip(start, found, strict=True):
        changed = [n for n, (a, b) in enumerate(zip(before.ids, after.ids, strict=True)) if a != b]
        assert set(changed) <= set(before.free) and len(changed) <= BUDGET.changes
        assert {after.ids[n] for n in changed} <= set(allowed)
        assert (before.id, before.answer, before.free) == (after.id, after.answer, after.free)
    assert bool((victim.losses(found) >= victim.losses(start) - 1e-4).all())


@pytest.mark.parametrize("name", of("words"))
def test_words(name):
    """One edit of one word, by the seed; over many draws it changes something."""
    edits = [ATTACKS[name]("precision", Random(seed)) for seed in range(20)]
    assert edits == [ATTACKS[name]("precision", Random(seed)) for seed in range(20)]
    assert any(word != "precision" for word in edits) and not any("\n" in word for word in edits)


@pytest.mark.parametrize("name", of("embeddings"))
def test_embeddings(name):
    """Within the radius, at free tokens alone, by the seed, and the loss rises; the parameters get no gradient."""
    lm = chat()
    (case,) = build_cases(lm.tokenizer, *questions(1), place="swap")
    victim, free_BT = Victim(lm, ["w4"]), torch.zeros(1, len(case.ids) + len(case.answer), dtype=torch.bool)
    free_BT[0, : len(case.ids)] = True
    with victim.at("w4"):
        how = {"radius": 0.1, "iterations": 2, "seed": 3}
        moves = [ATTACKS[name](lm.model, lambda: victim.nll([case]).sum(), free_BT, **how) for _ in range(2)]
        with torch.no_grad():
            before = float(victim.nll([case]))
            with nudged(lm.model, moves[0]):
                after = float(victim.nll([case]))
    assert torch.equal(*moves) and not moves[0][~free_BT].any()
    assert 0 < float(moves[0].norm(dim=-1).max()) <= 0.1 + 1e-5
    assert after > before and all(p.grad is None for p in lm.model.parameters())


@pytest.mark.parametrize("name", [*of("tokens"), *of("words")])
def test_prompts_of_every_attacker(name):
    """The right answer stays in the prompt, the model says it less surely, and the model is as it was."""
    lm = chat()
    asked, answers = questions(3)
    before = {key: tensor.clone() for key, tensor in lm.model.state_dict().items()}
    quiz = Quiz(lm.tokenizer, asked, answers)
    prompts = attacked_prompts(lm, quiz, ["w8", "w3"], name, BUDGET, place="swap", seed=2)
    assert list(prompts) == ["nobody", "w8", "w3", "all widths"]
    for attacker, looked_at in (("w8", ["w8"]), ("w3", ["w3"]), ("all widths", ["w8", "w3"])):
        victim = Victim(lm, looked_at)
        assert float((victim.losses(prompts[attacker]) - victim.losses(prompts["nobody"])).mean()) > 0
        for one, case in zip(asked, prompts[attacker], strict=True):
            text = lm.tokenizer.decode(case.ids)
            assert answers[one.id][0].text in text and one.question in text
    after = lm.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert len(answer_at_every(lm, prompts, ["w8"], max_tokens=4)) == 4
