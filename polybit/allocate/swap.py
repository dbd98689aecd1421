"""Better than the sum of its parts: a plan improved by measuring it as a whole, because harms do not simply add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from polybit.allocate.knapsack import WidthChoice, solve

Losses = Callable[[Sequence[Mapping[str, int]]], Sequence[float]]  # plans -> measured harm of each as a whole
PAIRS = 12  # exchanges tried when no combination of steps is better
LEAST_GAIN = 1e-3  # share of the loss by which a plan must be better, so that noise is not chased


@dataclass(slots=True)
class Progress:
    """The best plan so far, its measured loss, what was measured, and the accepted losses in order."""

    widths: dict[str, int]
    loss: float
    allowed: int
    evaluations: int = 1
    history: list[float] = field(default_factory=list)


def improve(
    start: Mapping[str, int],
    choices: Mapping[str, Mapping[int, WidthChoice]],
    groups: Sequence[Sequence[str]],
    budget_bits: float,
    losses: Losses,
    *,
    evaluations: int = 80,
) -> Progress:
    """Lower the measured loss of a plan within the budget; never worse than the start, at most `evaluations` measured.

    Each round measures, in the context of the present plan, what one step more or less costs every group, and solves
    the knapsack over these steps with the measured harms; when that is no better, single exchanges (one group up,
    one down) are tried, the most promising first. Ends when a round finds nothing. One-at-a-time harms are not additive
    (EvoPress, arXiv 2410.14649); these are harms of single steps around the plan itself. Deterministic.
    """
    now = Progress(dict(start), losses([start])[0], evaluations)
    now.history.append(now.loss)
    while now.evaluations < now.allowed:
        steps = neighbours(now, choices, groups, losses)
        room = budget_bits - sum(choices[name][width].bits for name, width in now.widths.items())
        if not (jump(now, steps, choices, groups, budget_bits, losses) or exchange(now, steps, groups, room, losses)):
            break
    return now


@dataclass(frozen=True, slots=True)
class Step:
    """One group at another width: bits and harm relative to the present plan."""

    group: int
    width: int
    bits: float
    harm: float


def neighbours(
    now: Progress, choices: Mapping[str, Mapping[int, WidthChoice]], groups: Sequence[Sequence[str]], losses: Losses
) -> list[Step]:
    """Every group one width up and down, measured in the present plan; beyond the allowance as the tables say."""
    wanted = []
    for at, group in enumerate(groups):
        widths = sorted(set.intersection(*(set(choices[name]) for name in group)))
        here = widths.index(now.widths[group[0]])
        for there in (here - 1, here + 1):
            if 0 <= there < len(widths):
                was = [choices[name][widths[here]] for name in group]
                gets = [choices[name][widths[there]] for name in group]
                bits = sum(c.bits for c in gets) - sum(c.bits for c in was)
                harm = sum(c.harm for c in gets) - sum(c.harm for c in was)
                wanted.append(Step(at, widths[there], bits, harm))
    # where not all can be measured: steps up that promise most per bit and steps down that cost least, in turns
    ups, downs = ([i for i, step in enumerate(wanted) if (step.bits > 0) == up] for up in (True, False))
    ups.sort(key=lambda i: wanted[i].harm / wanted[i].bits)
    downs.sort(key=lambda i: wanted[i].harm / -wanted[i].bits)
    order = [i for pair in zip_longest(ups, downs) for i in pair if i is not None]
    level = scale_of(wanted, now.loss)
    found = [replace(step, harm=step.harm * level) for step in wanted]
    measured = order[: max(0, now.allowed - 1 - now.evaluations)]
    tried = [now.widths | dict.fromkeys(groups[wanted[i].group], wanted[i].width) for i in measured]
    for i, loss in zip(measured, losses(tried), strict=True):
        found[i] = replace(wanted[i], harm=loss - now.loss)
    now.evaluations += len(measured)
    return found


def scale_of(steps: Sequence[Step], level: float) -> float:
    """Brings table harms to the size of measured ones, for steps that are not measured."""
    largest = max((abs(step.harm) for step in steps), default=0.0)
    return level / largest / 10 if largest else 1.0


def jump(
    now: Progress,
    steps: Sequence[Step],
    choices: Mapping[str, Mapping[int, WidthChoice]],
    groups: Sequence[Sequence[str]],
    budget_bits: float,
    losses: Losses,
) -> bool:
    """The best combination of all steps, if they added up; taken when it measures better."""
    rows = {str(at): {now.widths[group[0]]: WidthChoice(0.0, 0.0)} for at, group in enumerate(groups)}
    used = [sum(choices[name][now.widths[name]].bits for name in group) for group in groups]
    for at, bits in enumerate(used):
        rows[str(at)] = {now.widths[groups[at][0]]: WidthChoice(bits, 0.0)}
    for step in steps:
        rows[str(step.group)][step.width] = WidthChoice(used[step.group] + step.bits, step.harm)
    picked = solve(rows, [[name] for name in rows], max(budget_bits, sum(used)))
    plan = {name: picked[str(at)] for at, group in enumerate(groups) for name in group}
    return take(now, plan, losses)


def exchange(
    now: Progress, steps: Sequence[Step], groups: Sequence[Sequence[str]], room: float, losses: Losses
) -> bool:
    """One group up and another down, most promising first; the first pair that measures better is taken.

    room: bits the present plan leaves of the budget.
    """
    # pairs that do not look good come last but are tried: two steps may do together what neither does alone
    pairs = []
    for up in (step for step in steps if step.bits > 0):
        for down in (step for step in steps if step.bits < 0 and step.group != up.group):
            if up.bits + down.bits <= room:
                pairs.append((up.harm + down.harm, up, down))
    for _, up, down in sorted(pairs, key=lambda pair: pair[0])[:PAIRS]:
        plan = dict(now.widths)
        for step in (up, down):
            plan |= dict.fromkeys(groups[step.group], step.width)
        if take(now, plan, losses):
            return True
    return False


def take(now: Progress, plan: dict[str, int], losses: Losses) -> bool:
    """Measure a plan and keep it when it is better by more than noise."""
    if plan == now.widths or now.evaluations >= now.allowed:
        return False
    (found,) = losses([plan])
    now.evaluations += 1
    if found >= now.loss * (1 - LEAST_GAIN):
        return False
    now.widths, now.loss = plan, found
    now.history.append(found)
    return True
