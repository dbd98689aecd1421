"""Token swaps through the model's own gradient: HotFlip, and the greedy coordinate search of GCG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from polybit.core.runtime import track
from polybit.robust.cases import Case
from polybit.robust.gradients import Victim
from polybit.robust.table import AttackBudget


def greedy(
    victim: Victim, cases: Sequence[Case], budget: AttackBudget, allowed: Sequence[int], *, seed: int = 0
) -> list[Case]:
    """At every step `tries` swaps drawn among the `top` likeliest by the gradient are measured, and the best is kept.

    GCG: Zou et al., arXiv 2307.15043, algorithm 1; unlike the paper, the loss to raise is that of the right answer, and
    a swap that does not raise it is not made.
    """
    return where_free(cases, lambda movable: climb(victim, movable, budget, allowed, guided=True, seed=seed))


def random(
    victim: Victim, cases: Sequence[Case], budget: AttackBudget, allowed: Sequence[int], *, seed: int = 0
) -> list[Case]:
    """As `greedy`, with swaps drawn without a gradient: what search alone achieves."""
    return where_free(cases, lambda movable: climb(victim, movable, budget, allowed, guided=False, seed=seed))


def hotflip(
    victim: Victim, cases: Sequence[Case], budget: AttackBudget, allowed: Sequence[int], *, seed: int = 0
) -> list[Case]:
    """At every step the best swap by the gradient alone is made unseen; the best prompt on the way is kept.

    HotFlip: Ebrahimi et al., ACL 2018. Nothing is drawn, so `seed` changes nothing.
    """
    return where_free(cases, lambda movable: follow(victim, movable, budget, allowed))


def where_free(cases: Sequence[Case], search: Callable[[list[Case]], list[Case]]) -> list[Case]:
    """What a search makes of the cases with a free position; a text of protected words alone stays as it is."""
    movable = [n for n, case in enumerate(cases) if case.free]
    moved = search([cases[n] for n in movable]) if movable else []
    found_at = dict(zip(movable, moved, strict=True))
    return [found_at.get(n, case) for n, case in enumerate(cases)]


def climb(
    victim: Victim, cases: list[Case], budget: AttackBudget, allowed: Sequence[int], *, guided: bool, seed: int
) -> list[Case]:
    """The best of swaps that are measured, step by step; guided: drawn among the likeliest by the gradient."""
    generator = torch.Generator().manual_seed(seed)
    best, best_N = list(cases), torch.full((len(cases),), -torch.inf)
    for step in track(range(budget.steps), title(victim)):
        gains: Sequence[Tensor | None] = [None] * len(best)
        if guided:
            now_N, found = victim.gains(best)
            gains = open_gains(found, best, cases, budget, allowed)
        else:
            now_N = best_N if step else victim.losses(best)
        keep_better(best, best_N, best, now_N)
        tried = [
            candidates(case, gain, start, budget, allowed, generator)
            for case, gain, start in zip(best, gains, cases, strict=True)
        ]
        flat = [case for row in tried for case in row]
        losses = victim.losses(flat).split([len(row) for row in tried])
        for n, (row, loss_K) in enumerate(zip(tried, losses, strict=True)):
            top = int(loss_K.argmax())
            if loss_K[top] > best_N[n]:
                best[n], best_N[n] = row[top], loss_K[top]
    return best


def follow(victim: Victim, cases: list[Case], budget: AttackBudget, allowed: Sequence[int]) -> list[Case]:
    """The best prompt on a way of swaps that are made unseen."""
    now, best, best_N = list(cases), list(cases), torch.full((len(cases),), -torch.inf)
    for _ in track(range(budget.steps), title(victim)):
        now_N, found = victim.gains(now)
        keep_better(best, best_N, now, now_N)
        gains = open_gains(found, now, cases, budget, allowed)
        now = [flip(case, gain) for case, gain in zip(now, gains, strict=True)]
    keep_better(best, best_N, now, victim.losses(now))
    return best


def title(victim: Victim) -> str:
    """What the progress bar says."""
    return f"attack at {' '.join(str(preset) for preset in victim.presets)}"


def open_gains(
    gains: Sequence[Tensor], now: Sequence[Case], start: Sequence[Case], budget: AttackBudget, allowed: Sequence[int]
) -> list[Tensor]:
    """First-order gains [P, V] of each case, minus infinity where a swap may not be made."""
    banned_V = torch.full((gains[0].shape[1],), -torch.inf)
    banned_V[list(allowed)] = 0.0
    rows = zip(gains, now, start, strict=True)
    return [closed(gain_PV + banned_V, case, first, budget) for gain_PV, case, first in rows]


def keep_better(best: list[Case], best_N: Tensor, now: Sequence[Case], now_N: Tensor) -> None:
    """Take over, in place, what is now worse for the model than the best so far."""
    for n, case in enumerate(now):
        if now_N[n] > best_N[n]:
            best[n], best_N[n] = case, now_N[n]


def closed(gain_PV: Tensor, case: Case, start: Case, budget: AttackBudget) -> Tensor:
    """Gains without those of positions the budget of changes has closed, and without swaps that change nothing."""
    gain_PV = gain_PV.clone()
    gain_PV[torch.arange(len(case.free)), list(case.tokens)] = -torch.inf
    for position in shut(case, start, budget):
        gain_PV[position] = -torch.inf
    return gain_PV


def shut(case: Case, start: Case, budget: AttackBudget) -> Iterator[int]:
    """Numbers of the free positions that may not change any more."""
    changed = [now != then for now, then in zip(case.tokens, start.tokens, strict=True)]
    if budget.changes and sum(changed) >= budget.changes:
        yield from (n for n, differs in enumerate(changed) if not differs)


def flip(case: Case, gain_PV: Tensor) -> Case:
    """The one swap the gradient promises most of."""
    best = int(gain_PV.argmax())
    if torch.isinf(gain_PV.flatten()[best]):
        return case
    return swapped(case, best // gain_PV.shape[1], best % gain_PV.shape[1])


def swapped(case: Case, position: int, token: int) -> Case:
    """The case with another token at one free position."""
    tokens = list(case.tokens)
    tokens[position] = token
    return case.with_tokens(tokens)


def candidates(
    case: Case,
    gain_PV: Tensor | None,
    start: Case,
    budget: AttackBudget,
    allowed: Sequence[int],
    generator: torch.Generator,
) -> list[Case]:
    """`tries` cases that differ from `case` at one free position each."""
    places = sorted(set(range(len(case.free))) - set(shut(case, start, budget)))
    drawn = torch.randint(len(places), (budget.tries,), generator=generator).tolist()
    if gain_PV is None:
        picks = torch.randint(len(allowed), (budget.tries,), generator=generator).tolist()
        return [swapped(case, places[p], allowed[t]) for p, t in zip(drawn, picks, strict=True)]
    likely_PK = gain_PV.topk(min(budget.top, len(allowed) - 1), dim=1).indices
    picks = torch.randint(likely_PK.shape[1], (budget.tries,), generator=generator).tolist()
    return [swapped(case, places[p], int(likely_PK[places[p], t])) for p, t in zip(drawn, picks, strict=True)]
