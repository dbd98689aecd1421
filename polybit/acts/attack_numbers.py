"""What a game between attackers and widths comes to: means with intervals, and the verdict on drawing a width."""

from __future__ import annotations

from typing import Any

import numpy as np

from polybit.evals.scoring import bootstrap
from polybit.robust.attackers import ADAPTIVE
from polybit.robust.transfer import TransferGame

MatrixNumbers = dict[str, Any]  # as they stand in the JSON of `polybit attack`
DRAWN = "drawn per prompt"
DRAWS = 3  # seeded draws shown beside the expectation


def numbers_of(game: TransferGame) -> MatrixNumbers:
    """Means with intervals, and the verdict on drawing a width per prompt."""
    matrix: dict[str, Any] = {}
    for attacker in game.attackers:
        row = {name: bootstrap(game.cell(attacker, name) > 0.5).to_json() for name in game.defenders}
        row[DRAWN] = bootstrap(game.against([attacker]).mean(1)[0]).to_json()
        matrix[attacker] = row
    each_width = list(game.defenders)
    judged: dict[str, Any] = {}
    for label, names in (("plain", each_width), ("adaptive", [*each_width, ADAPTIVE])):
        best = game.best_fixed(names)
        judged[label] = {
            "best_fixed": best,
            "fixed": bootstrap(game.fixed(best, names)).to_json(),
            "drawn": bootstrap(game.drawn(names)).to_json(),
            "gain": bootstrap(game.drawn(names), paired_with=game.fixed(best, names)).to_json(),
        }
    draws = [float(game.one_draw(ADAPTIVE, seed).mean()) for seed in range(DRAWS)]
    return {
        "items": game.right_ADN.shape[2],
        "attackers": list(game.attackers),
        "defenders": each_width,
        "matrix": matrix,
        "random_precision": judged | {"three_draws": draws},
        "transfer": transfer_gap(game),
        "verdict": verdict(judged["adaptive"]),
    }


def transfer_gap(game: TransferGame) -> dict[str, Any]:
    """Score at other widths minus score at the attacked width, over all single-width attackers: above 0, attacks
    transfer poorly."""
    own, other = [], []
    for name in game.defenders:
        own.append(game.cell(name, name))
        rest = [game.cell(name, answering) for answering in game.defenders if answering != name]
        other.append(np.mean(rest, axis=0) if rest else game.cell(name, name))
    diagonal, off = np.mean(own, axis=0), np.mean(other, axis=0)
    return {
        "diagonal": bootstrap(diagonal).to_json(),
        "off_diagonal": bootstrap(off).to_json(),
        "difference": bootstrap(off, paired_with=diagonal).to_json(),
    }


def verdict(judged: dict[str, Any]) -> str:
    """One sentence: is a width drawn per prompt more robust than the best fixed one?"""
    gain = judged["gain"]
    points = f"{100 * gain['value']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    against = f"the best fixed width ({judged['best_fixed']}), each under its worst attacker ({points})"
    if gain["low"] > 0:
        return f"A width drawn per prompt is more robust than {against}."
    if gain["high"] < 0:
        return f"A width drawn per prompt is less robust than {against}."
    return f"A width drawn per prompt is not shown to be more robust than {against}."
