"""The game between attackers and precisions: rows, columns, best fixed, drawn - against literal counting."""

import numpy as np
import pytest

from polybit.core.runtime import PolybitError
from polybit.nn.switch import random_precision
from polybit.robust.attackers import ADAPTIVE
from polybit.robust.cases import build_cases
from polybit.robust.transfer import TransferGame, answer, answer_at_every, embedding_game
from tests.robust.models import chat, questions


def game():
    rng = np.random.default_rng(0)
    return TransferGame(("w8", "w4", "all widths"), ("w8", "w4"), (rng.random((3, 2, 40)) < 0.5).astype(float))


def test_fixed_and_drawn_are_counted_literally():
    g = game()
    for names in (["w8", "w4"], ["w8", "w4", "all widths"]):
        rows = [g.attackers.index(name) for name in names]
        fixed = {d: min(g.right_ADN[a, n].mean() for a in rows) for n, d in enumerate(g.defenders)}
        assert g.best_fixed(names) == max(fixed, key=fixed.get)
        for defender, value in fixed.items():
            assert g.fixed(defender, names).mean() == value
        drawn = min(np.mean([g.right_ADN[a, n].mean() for n in range(2)]) for a in rows)
        assert g.drawn(names).mean() == pytest.approx(drawn)
    with pytest.raises(PolybitError, match="no attack was measured"):
        g.fixed("w8", ["nobody"])


def test_drawing_can_win_only_where_attacks_transfer_poorly():
    transfers = TransferGame(("w8", "w4"), ("w8", "w4"), np.zeros((2, 2, 10)))
    assert transfers.drawn(["w8", "w4"]).mean() == 0
    right = [[np.full(10, np.eye(2)[d][a] == 0) for d in range(2)] for a in range(2)]
    apart = TransferGame(("w8", "w4"), ("w8", "w4"), np.array(right).astype(float))
    assert apart.fixed(apart.best_fixed(["w8", "w4"]), ["w8", "w4"]).mean() == 0
    assert apart.drawn(["w8", "w4"]).mean() == 0.5


def test_a_draw_equals_random_precision_while_running():
    """Picking among the answers of fixed widths is what `random_precision(per="prompt")` answers."""
    lm = chat()
    cases = build_cases(lm.tokenizer, *questions(6), place="swap")
    presets = ("w8", "w3", "w2")
    said = answer_at_every(lm, {"nobody": cases}, presets)
    with random_precision(lm.model, presets, seed=2, per="prompt"):
        running = answer(lm, cases)
    # batches are formed by length, longest first, and draw in that order
    order = sorted(range(6), key=lambda n: -(len(cases[n].ids)))
    g = TransferGame(("nobody",), presets, np.zeros((1, 3, 6)))
    assert g.one_draw("nobody", 2).shape == (6,)
    import torch

    from polybit.nn.draw import draw

    picks = draw(3, 6, torch.Generator().manual_seed(2))
    assert [running[n] for n in order] == [said["nobody", presets[p]][n] for p, n in zip(picks, order, strict=True)]


def test_embeddings_move_the_game_too():
    lm = chat()
    cases = build_cases(lm.tokenizer, *questions(8), place="swap")
    found = embedding_game(lm, cases, ("w8", "w3"), epsilon=0.5, iterations=4)
    assert found.attackers == ("nobody", "w8", "w3", ADAPTIVE) and found.right_ADN.shape == (4, 2, 8)
    assert found.cell("nobody", "w8").mean() > 0.7
    assert found.cell("w8", "w8").mean() < found.cell("nobody", "w8").mean()
    still = embedding_game(lm, cases, ("w8", "w3"), epsilon=1e-6, iterations=1)
    assert np.array_equal(still.right_ADN[1], still.right_ADN[0])
    # saying the answer freely is the same as saying it token by token after the right ones
    with lm.at("w8"):
        said = answer(lm, cases)
    _, answers = questions(8)
    spoken = [float(text == answers[case.id][0].text) for text, case in zip(said, cases, strict=True)]
    assert spoken == found.cell("nobody", "w8").tolist()
