"""Token swaps through the model's own gradient: HotFlip, and the greedy coordinate search of GCG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError, track
from polybit.robust.cases import Case
from polybit.robust.gradients import Target

Method = Literal["greedy", "hotflip", "random"]


@dataclass(frozen=True, slots=True)
class Search:
    """How hard an attacker looks.

    greedy: at every step `tries` swaps drawn among the `top` likeliest by the gradient at each position are measured,
    the best is kept (GCG: Zou et al., arXiv 2307.15043, algorithm 1; unlike the paper, the loss to raise is that of the
    right answer, and a swap that does not raise it is not made) · hotflip: the best swap by the gradient alone is made
    unseen, and the best prompt on the way kept · random: as greedy, with swaps drawn without a gradient; what search
    alone achieves.
    changes: at most so many free positions of a case differ from its start (0 = all may).
    """

    method: Method = "greedy"
    steps: int = 8
    tries: int = 12
    top: int = 64
    changes: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("greedy", "hotflip", "random"):
            raise PolybitError(f"attack {self.method!r} is not known: choose greedy, hotflip or random")
        for name, value, least in (("steps", self.steps, 1), ("tries", self.tries, 1), ("top", self.top, 1)):
            if value < least:
                raise PolybitError(f"{name} of an attack is {value}: give {least} or more")


def attack(
    target: Target, cases: Sequence[Case], search: Search, allowed: Sequence[int], *, seed: int = 0
) -> list[Case]:
    """The cases with the tokens that raise the loss of their right answers most; never worse than they were."""
    movable = [n for n, case in enumerate(cases) if case.free]
    if len(movable) < len(cases):  # a text of protected words alone stays as it is
        moved = attack(target, [cases[n] for n in movable], search, allowed, seed=seed) if movable else []
        found_at = dict(zip(movable, moved, strict=True))
        return [found_at.get(n, case) for n, case in enumerate(cases)]
    generator = torch.Generator().manual_seed(seed)
    banned_V: Tensor | None = None
    now, best = list(cases), list(cases)
    best_N = torch.full((len(cases),), -torch.inf)
    for _ in track(range(search.steps), f"attack at {' '.join(str(p) for p in target.presets)}"):
        if search.method == "random":
            now_N = target.losses(now) if torch.isinf(best_N).any() else best_N
            gains: list[Tensor | None] = [None] * len(now)
        else:
            now_N, found = target.gains(now)
            gains = list(found)
            if banned_V is None:
                banned_V = torch.full((found[0].shape[1],), -torch.inf)
                banned_V[list(allowed)] = 0.0
            gains = [
                closed(gain + banned_V, case, start, search)
                for gain, case, start in zip(found, now, cases, strict=True)
            ]
        keep_better(best, best_N, now, now_N)
        if search.method == "hotflip":
            now = [flip(case, gain) for case, gain in zip(now, gains, strict=True)]
            continue
        tried = [
            candidates(case, gain, start, search, allowed, generator)
            for case, gain, start in zip(best, gains, cases, strict=True)
        ]
        flat = [case for row in tried for case in row]
        losses = target.losses(flat).split([len(row) for row in tried])
        for n, (row, loss_K) in enumerate(zip(tried, losses, strict=True)):
            top = int(loss_K.argmax())
            if loss_K[top] > best_N[n]:
                best[n], best_N[n] = row[top], loss_K[top]
        now = list(best)
    if search.method == "hotflip":
        keep_better(best, best_N, now, target.losses(now))
    return best


def keep_better(best: list[Case], best_N: Tensor, now: Sequence[Case], now_N: Tensor) -> None:
    """Take over, in place, what is now worse for the model than the best so far."""
    for n, case in enumerate(now):
        if now_N[n] > best_N[n]:
            best[n], best_N[n] = case, now_N[n]


def closed(gain_PV: Tensor, case: Case, start: Case, search: Search) -> Tensor:
    """Gains without those of positions the budget of changes has closed, and without swaps that change nothing."""
    gain_PV = gain_PV.clone()
    gain_PV[torch.arange(len(case.free)), list(case.tokens)] = -torch.inf
    for position in shut(case, start, search):
        gain_PV[position] = -torch.inf
    return gain_PV


def shut(case: Case, start: Case, search: Search) -> Iterator[int]:
    """Numbers of the free positions that may not change any more."""
    changed = [now != then for now, then in zip(case.tokens, start.tokens, strict=True)]
    if search.changes and sum(changed) >= search.changes:
        yield from (n for n, differs in enumerate(changed) if not differs)


def flip(case: Case, gain_PV: Tensor | None) -> Case:
    """The one swap the gradient promises most of."""
    assert gain_PV is not None
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
    search: Search,
    allowed: Sequence[int],
    generator: torch.Generator,
) -> list[Case]:
    """`tries` cases that differ from `case` at one free position each."""
    places = sorted(set(range(len(case.free))) - set(shut(case, start, search)))
    drawn = torch.randint(len(places), (search.tries,), generator=generator).tolist()
    if gain_PV is None:
        picks = torch.randint(len(allowed), (search.tries,), generator=generator).tolist()
        return [swapped(case, places[p], allowed[t]) for p, t in zip(drawn, picks, strict=True)]
    likely_PK = gain_PV.topk(min(search.top, len(allowed) - 1), dim=1).indices
    picks = torch.randint(likely_PK.shape[1], (search.tries,), generator=generator).tolist()
    return [swapped(case, places[p], int(likely_PK[places[p], t])) for p, t in zip(drawn, picks, strict=True)]
