"""Who is fooled by whom: prompts attacked at one precision, answered at every other, and by one drawn per prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from polybit.core.runtime import PolybitError
from polybit.data.batches import pad
from polybit.hub.lm import LocalLM
from polybit.nn.draw import draw
from polybit.robust.attackers import NOBODY, views
from polybit.robust.cases import Case
from polybit.robust.embeddings import ascend
from polybit.robust.gradients import Victim, embedding_matrix, nudged

Array = NDArray[np.float64]


def answer(lm: LocalLM, cases: Sequence[Case], *, max_tokens: int = 24) -> list[str]:
    """What the model says to each case at the precision it has now."""
    said = lm.generate_tokens([case.ids for case in cases], max_tokens=max_tokens, label="answers")
    return [lm.decode(tokens, after=case.ids).strip() for case, tokens in zip(cases, said, strict=True)]


def answer_at_every(
    lm: LocalLM, prompts: Mapping[str, Sequence[Case]], presets: Sequence[str], *, max_tokens: int = 24
) -> dict[tuple[str, str], list[str]]:
    """(attacker, precision that answers) -> answers."""
    found = {}
    for preset in presets:
        with lm.at(preset):
            for attacker, cases in prompts.items():
                found[attacker, preset] = answer(lm, cases, max_tokens=max_tokens)
    return found


@dataclass(frozen=True, slots=True)
class TransferGame:
    """Scores of every attacker (row) against every fixed precision (column), per item: right_ADN, 0..1.

    A defender who draws a precision per prompt scores the mean over its columns, exactly and without a draw, because
    each prompt is answered by one of the networks measured here.
    """

    attackers: tuple[str, ...]
    defenders: tuple[str, ...]
    right_ADN: Array

    def cell(self, attacker: str, defender: str) -> Array:
        """Scores per item."""
        return self.right_ADN[self.attackers.index(attacker), self.defenders.index(defender)]

    def against(self, names: Sequence[str]) -> Array:
        """The rows of some attackers."""
        missing = [name for name in names if name not in self.attackers]
        if missing or not names:
            raise PolybitError(f"no attack was measured for {missing[0] if missing else 'nobody'!r}")
        return self.right_ADN[[self.attackers.index(name) for name in names]]

    def fixed(self, defender: str, names: Sequence[str]) -> Array:
        """Scores per item of one fixed precision under the attacker that harms it most on average."""
        rows_AN = self.against(names)[:, self.defenders.index(defender)]
        return rows_AN[rows_AN.mean(1).argmin()]

    def best_fixed(self, names: Sequence[str]) -> str:
        """The fixed precision that stands best against its worst attacker."""
        return max(self.defenders, key=lambda defender: float(self.fixed(defender, names).mean()))

    def drawn(self, names: Sequence[str]) -> Array:
        """Expected scores per item of a precision drawn uniformly per prompt, under its worst attacker."""
        rows_AN = self.against(names).mean(1)
        return rows_AN[rows_AN.mean(1).argmin()]

    def one_draw(self, attacker: str, seed: int) -> Array:
        """Scores per item of one seeded draw per prompt, as `random_precision(per="prompt")` makes it."""
        rows_DN = self.right_ADN[self.attackers.index(attacker)]
        picks = draw(len(self.defenders), rows_DN.shape[1], torch.Generator().manual_seed(seed))
        return rows_DN[picks, np.arange(rows_DN.shape[1])]


def embedding_game(
    lm: LocalLM,
    cases: Sequence[Case],
    presets: Sequence[str],
    *,
    epsilon: float,
    iterations: int = 10,
    seed: int = 0,
    ascent: Callable[..., torch.Tensor] = ascend,
) -> TransferGame:
    """The game in embedding space: PGD at each precision, and at all, then every precision on the moved embeddings.

    This is the transfer experiment of Double-Win Quant (figure 1) with embeddings in place of pixels: every token of a
    prompt moves by at most `epsilon` times the mean length of an embedding. An answer counts as right when every one
    of its tokens, EOS included, is the likeliest after the right ones before it.
    ascent: an attack on embeddings, as `ascend` is one.
    """
    with torch.no_grad():
        radius = epsilon * float(embedding_matrix(lm.model).norm(dim=1).mean())
    rows, _ = pad([[*case.ids, *case.answer] for case in cases], lm.pad_token())
    free_BT = torch.zeros(rows.shape, dtype=torch.bool)
    for row, case in enumerate(cases):
        free_BT[row, : len(case.ids)] = True
    free_BT = free_BT.to(lm.device)
    attackers = views(presets)
    found = [[right_at(lm, cases, preset, None) for preset in presets]]
    for looked_at in attackers.values():

        def loss(looked_at: Sequence[str] = looked_at) -> torch.Tensor:
            total = torch.zeros((), device=lm.device)
            for preset in looked_at:
                target = Victim(lm, [preset])
                with target.at(preset):
                    total = total + target.nll(cases).sum() / len(looked_at)
            return total

        delta_BTD = ascent(lm.model, loss, free_BT, radius=radius, iterations=iterations, seed=seed)
        found.append([right_at(lm, cases, preset, delta_BTD) for preset in presets])
    return TransferGame((NOBODY, *attackers), tuple(presets), np.array(found))


@torch.no_grad()
def right_at(lm: LocalLM, cases: Sequence[Case], preset: str, delta_BTD: torch.Tensor | None) -> Array:
    """1 for each case whose right answer a precision would say, token by token, on moved embeddings."""
    ids_BT, mask_BT = (t.to(lm.device) for t in pad([[*case.ids, *case.answer] for case in cases], lm.pad_token()))
    moved = torch.zeros((), device=lm.device) if delta_BTD is None else delta_BTD
    target = Victim(lm, [preset])
    with target.at(preset), nudged(lm.model, moved):
        said_BT = lm.model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits.argmax(-1).cpu()
    right = []
    for row, case in enumerate(cases):
        start, stop = len(case.ids) - 1, len(case.ids) + len(case.answer) - 1
        right.append(float(said_BT[row, start:stop].tolist() == list(case.answer)))
    return np.array(right)
