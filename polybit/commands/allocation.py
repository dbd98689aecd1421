"""The acts behind `polybit allocate`: gather text, measure, solve, improve, prove."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from polybit.allocate.costs import clean, combine, mean_tables, rescaled
from polybit.allocate.groups import fused_groups
from polybit.allocate.knapsack import Choice, solve
from polybit.allocate.swap import improve
from polybit.commands.allocate import FRONT, HELD_OUT, AllocateConfig, is_embedded, pinned
from polybit.commands.sensitivities import Measured, Quantizing, Task, default_cache, measured
from polybit.compress import text
from polybit.compress.blocks import outside
from polybit.core.affine import ZeroKind
from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.records import CostTable
from polybit.core.runtime import PolybitError
from polybit.data.answers import EMBEDDED as EMBEDDED_TASKS
from polybit.data.answers import encode_task, read_task
from polybit.hub.lm import longest_input
from polybit.hub.models import EMBEDDED, resolve
from polybit.hub.workspace import model_digest
from polybit.measure.plan_loss import PlanLoss, PlanReading
from polybit.measure.probe import Probe, answer_probe, text_probe
from polybit.measure.signals import agreement
from polybit.nn.convert import Target, targets

FAST = {"descent_sweeps": 2}  # of gptq: ranks layers like 6 sweeps (tau 0.9 even with 0) in a third of the seconds
RANKED = 3  # width at which layers are ranked, where it was measured


@dataclass(frozen=True, slots=True)
class Material:
    """Probes to read sensitivities on and others for the proof; which are tasks; windows to calibrate on."""

    probes: tuple[Probe, ...]
    held_out: tuple[Probe, ...]
    tasks: tuple[str, ...]
    general: tuple[str, ...]
    calibration: tuple[Tensor, ...]


def build(name: str, config: AllocateConfig, widths: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the plan's document, the run's numbers)."""
    from polybit.hub.load import load_float

    model, tokenizer = load_float(resolve(name), trust_remote_code=config.trust_remote_code)
    model.requires_grad_(False)
    everything = targets(model)
    chosen = inner_targets(model, name)
    zero: ZeroKind = "group" if config.asymmetric else "centre"
    knobs = FAST if config.method == "gptq" else {}
    quantizing = Quantizing(widths, config.method, config.group_size, zero, knobs)
    check_budget(config.bits, chosen, quantizing)
    pins = pinned(config.pin or (), [t.name for t in chosen], widths)
    material = gather(model, tokenizer, name, config)
    task = Task(
        resolve(name),
        config.trust_remote_code,
        tuple(chosen),
        material.probes,
        material.calibration,
        quantizing,
        config.sensitivity,
        config.seed,
    )
    cache = config.cache or default_cache()
    found = measured(model, task, model_digest(model), cache, workers=config.workers, restart=config.restart)
    table = harms(found, material, config)
    choices = choices_of(chosen, table, quantizing, pins)
    groups = fused_groups((t.name for t in chosen), free=config.free_groups)
    total = sum(t.size for t in chosen)
    start = solve(choices, groups, config.bits * total)
    judge = Judge(model, chosen, material, found.bank, config.beta)
    plan, steps = refined(start, choices, groups, config.bits * total, judge, config.refine)
    numbers: dict[str, Any] = {
        "budget": config.bits,
        "bits_per_weight": bits_of(plan, choices) / total,
        "group_size": config.group_size,
        "zero": quantizing.zero,
        "layers": describe(chosen, plan, groups, found),
        "layers_by_width": {str(w): n for w, n in sorted(Counter(plan.values()).items())},
        "tasks": list(material.tasks),
        "general": list(material.general),
        "agreement": agreements(found, material, config),
        "cost": found.cost,
        "refinement": steps,
        "proof": prove(plan, choices_of(chosen, table, quantizing, {}), total, judge, config),
        "front": front(choices, groups, total, judge),
    }
    document = {
        "made_for": {"model": EMBEDDED if is_embedded(name) else name, "layers": len(chosen), "weights": total},
        "bits_per_weight": round(numbers["bits_per_weight"], 4),
        "group_size": config.group_size,
        "zero": quantizing.zero,
        "better_than_uniform": numbers["proof"]["better_than_uniform"],
        "plan": plan_json(plan, [t.name for t in everything if t.name not in plan]),
    }
    return document, {**numbers, "plan": document["plan"]}


def plan_json(plan: Mapping[str, int], outside_blocks: Sequence[str]) -> dict[str, Any]:
    """The plan as it is written: every layer by name, no default, so that a layer left out is noticed."""
    layers = {layer: Precision(w=width) for layer, width in plan.items()} | dict.fromkeys(outside_blocks, Precision())
    value = Plan(layers=layers).to_json()
    value.pop("default")
    return value


def inner_targets(model, name: str) -> list[Target]:
    """The weights inside the decoder blocks; what lies outside keeps its own width and takes no part."""
    everything = targets(model)
    if not everything:
        raise PolybitError(f"{name} has no weight that can be quantized: only embeddings, norms or unknown layers")
    outer = {target.name for target in outside(model, everything)}
    return [target for target in everything if target.name not in outer]


def check_budget(bits: float, chosen: Sequence[Target], quantizing: Quantizing) -> None:
    """Refuse budgets no assignment can meet, and those that need no choice."""
    total = sum(t.size for t in chosen)
    low, high = (
        sum(t.size * quantizing.grid(w).bits_per_weight(t.rows, t.columns) for t in chosen) / total
        for w in (quantizing.widths[0], quantizing.widths[-1])
    )
    if not low <= bits <= high:
        side = "below" if bits < low else "above"
        end = "smallest" if bits < low else "largest"
        raise PolybitError(
            f"--bits {bits:g} is {side} {low if bits < low else high:.3f}, the {end} that widths "
            f"{','.join(map(str, quantizing.widths))} give in groups of {quantizing.group_size or 'a row'}: "
            f"choose {low:.3f} to {high:.3f}, or change --widths or --group-size"
        )


def gather(model, tokenizer, name: str, config: AllocateConfig) -> Material:
    """Read the general text and the tasks, part of each kept for the proof."""
    embedded = is_embedded(name)
    length = text.window_length(model, config.window)
    sources = config.general or [text.AUTO]
    tasks = config.tasks if config.tasks is not None else (list(EMBEDDED_TASKS) if embedded else [])
    probes, held_out, windows, general = [], [], [], []
    for source in sources:
        part = text.gather(
            model,
            tokenizer,
            source,
            samples=max(config.samples, -(-config.calibration_samples // len(sources))),
            length=length,
            seed=config.seed,
            held_out=HELD_OUT,
            embedded=embedded,
        )
        label = text.text_name("embedded" if source == text.AUTO and embedded else part.source)
        general.append(label)
        probes.append(text_probe(label, part.windows_NT[: config.samples], batch=text.BATCH))
        held_out.append(text_probe(label, part.held_out_MT, batch=text.BATCH))
        windows += text.batches(part.windows_NT, text.BATCH)
    for source in tasks:
        task = read_task(source, count=config.items + HELD_OUT, seed=config.seed)
        for warning in task.warnings:
            print(f"polybit: warning: {warning}", file=sys.stderr)
        rows = encode_task(tokenizer, task, most=min(longest_input(model) or length, 2 * length))
        kept = min(HELD_OUT, max(1, len(rows) // 5))
        if len(rows) < 2:
            raise PolybitError(
                f"task {source!r} has {len(rows)} item: at least two are needed, one to measure and one for the proof"
            )
        fill = tokenizer.pad_token_id or 0
        probes.append(answer_probe(task.name, rows[:-kept], padding=fill))
        held_out.append(answer_probe(task.name, rows[-kept:], padding=fill))
    labels = [probe.name for probe in probes]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise PolybitError(f"text {twice!r} is given twice: name each text once, as general or as a task")
    return Material(tuple(probes), tuple(held_out), tuple(labels[len(general) :]), tuple(general), tuple(windows))


def harms(found: Measured, material: Material, config: AllocateConfig) -> CostTable:
    """One table from all signals: general texts averaged, tasks averaged, both weighed by beta."""
    tables = {probe: clean(signal.table(config.signal)) for probe, signal in found.signals.items()}
    general = mean_tables([rescaled(tables[probe], "minmax") for probe in material.general])
    if not material.tasks:
        return general
    return combine(mean_tables([rescaled(tables[probe], "minmax") for probe in material.tasks]), general, config.beta)


def choices_of(
    chosen: Sequence[Target], table: CostTable, quantizing: Quantizing, pins: Mapping[str, int]
) -> dict[str, dict[int, Choice]]:
    """What every layer may have: effective bits of the whole layer, and harm."""
    return {
        t.name: {
            w: Choice(t.size * quantizing.grid(w).bits_per_weight(t.rows, t.columns), table.nats[t.name][w])
            for w in quantizing.widths
            if pins.get(t.name, w) == w
        }
        for t in chosen
    }


def bits_of(plan: Mapping[str, int], choices: Mapping[str, Mapping[int, Choice]]) -> float:
    """Effective bits of a plan."""
    return sum(choices[name][width].bits for name, width in plan.items())


class Judge:
    """Measures whole plans: KL of every probe, and one score, KL over that of a uniform plan weighed by beta."""

    def __init__(self, model, chosen: Sequence[Target], material: Material, bank, beta: float) -> None:
        self.search = PlanLoss(model, material.probes, chosen, bank)
        self.proof = PlanLoss(model, material.held_out, chosen, bank)
        self.names = [t.name for t in chosen]
        self.material, self.beta = material, beta if material.tasks else 0.0
        self.middle = sorted(next(iter(bank.values())))[len(next(iter(bank.values()))) // 2]
        self.levels: dict[int, dict[str, float]] = {}

    def read(self, plan: Mapping[str, int], *, held_out: bool = False) -> dict[str, PlanReading]:
        """Readings by probe."""
        return (self.proof if held_out else self.search)(plan)

    def score(self, readings: Mapping[str, PlanReading], *, held_out: bool = False) -> float:
        """Mean KL relative to the uniform plan of the middle width, tasks weighing beta."""
        if held_out not in self.levels:
            uniform = self.read(dict.fromkeys(self.names, self.middle), held_out=held_out)
            self.levels[held_out] = {probe: max(r.kl, 1e-12) for probe, r in uniform.items()}
        relative = {probe: r.kl / self.levels[held_out][probe] for probe, r in readings.items()}
        sides = [
            (share, [relative[probe] for probe in probes])
            for share, probes in ((self.beta, self.material.tasks), (1 - self.beta, self.material.general))
        ]
        return sum(share * sum(values) / len(values) for share, values in sides if share)

    def loss(self, plan: Mapping[str, int]) -> float:
        """The score on the search text."""
        return self.score(self.read(plan))


def refined(
    start: Mapping[str, int], choices, groups: Sequence[Sequence[str]], budget: float, judge: Judge, evaluations: int
) -> tuple[dict[str, int], dict[str, Any]]:
    """The plan after measured exchanges, and how it went."""
    if not evaluations:
        return dict(start), {"evaluations": 0, "history": []}
    done = improve(start, choices, groups, budget, judge.loss, evaluations=evaluations)
    return done.widths, {"evaluations": done.evaluations, "history": done.history}


def prove(plan: Mapping[str, int], choices, total: float, judge: Judge, config: AllocateConfig) -> dict[str, Any]:
    """The plan against uniform widths on text nothing was decided on; even bits lie on the line between two of them."""
    from polybit.evals.scoring import bootstrap

    def row(label: str, widths: Mapping[str, int]) -> dict[str, Any]:
        readings = judge.read(widths, held_out=True)
        kl = {
            probe: bootstrap(r.kl_N / r.tokens_N, seed=config.seed).to_json() | {"value": r.kl}
            for probe, r in readings.items()
        }
        bits = bits_of(widths, choices) / total
        return {"name": label, "bits": bits, "kl": kl, "score": judge.score(readings, held_out=True)}

    ours = row("this plan", plan)
    uniform = [row(f"uniform w{w}", dict.fromkeys(judge.names, w)) for w in sorted(next(iter(choices.values())))]
    line = even(ours["bits"], [(r["bits"], r["score"]) for r in uniform])
    return {
        "rows": [ours, *uniform],
        "score": ours["score"],
        "uniform_score": line,
        "better_than_uniform": ours["score"] <= line * (1 + 1e-9),
    }


def even(bits: float, points: Sequence[tuple[float, float]]) -> float:
    """What spending the bits evenly would score: the line between the neighbouring uniform widths, on a log scale.

    The score falls geometrically with the width, so this line lies below the straight one: it is the harder bar.
    """
    points = sorted(points)
    for (low, worse), (high, better) in pairwise(points):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(max(worse, 1e-12)) + share * math.log(max(better, 1e-12)))
    return points[0][1] if bits < points[0][0] else points[-1][1]


def front(choices, groups: Sequence[Sequence[str]], total: float, judge: Judge) -> list[dict[str, Any]]:
    """Solved plans at several budgets, measured on the held-out text."""
    low, high = (sum(pick(row.values(), key=lambda c: c.bits).bits for row in choices.values()) for pick in (min, max))
    found, seen = [], set()
    for at in range(FRONT):
        budget = low + (high - low) * at / (FRONT - 1)
        plan = solve(choices, groups, max(budget, least(choices, groups)))
        if (key := tuple(sorted(plan.items()))) in seen:
            continue
        seen.add(key)
        readings = judge.read(plan, held_out=True)
        kl = {probe: r.kl for probe, r in readings.items()}
        score = judge.score(readings, held_out=True)
        found.append({"bits": bits_of(plan, choices) / total, "score": score, "kl": kl})
    return found


def least(choices, groups: Sequence[Sequence[str]]) -> float:
    """Bits of the narrowest plan the groups allow."""
    from polybit.allocate.knapsack import merge

    return sum(min(c.bits for c in merge(choices, group).values()) for group in groups)


def describe(
    chosen: Sequence[Target], plan: Mapping[str, int], groups: Sequence[Sequence[str]], found: Measured
) -> dict[str, Any]:
    """Per layer: shape, width, group, and its sensitivities with intervals."""
    owner = {name: number for number, group in enumerate(groups) for name in group}
    tables = {
        probe: {loss: signal.estimates(loss) for loss in ("kl", "nll")} for probe, signal in found.signals.items()
    }
    return {
        t.name: {
            "shape": [t.rows, t.columns],
            "width": plan[t.name],
            "group": owner[t.name],
            "sensitivity": {
                probe: {loss: {str(w): e.to_json() for w, e in rows[t.name].items()} for loss, rows in by_loss.items()}
                for probe, by_loss in tables.items()
            },
        }
        for t in chosen
    }


def agreements(found: Measured, material: Material, config: AllocateConfig) -> dict[str, Any]:
    """How alike general text and each task rank the layers, by KL and by the loss itself."""
    result = {}
    for general in material.general:
        for task in material.tasks:
            one, other = found.signals[general], found.signals[task]
            if len(one.names) < 2:
                continue
            width = RANKED if RANKED in one.widths else one.widths[0]
            for loss in ("kl", "nll"):
                label = f"of {general} and {task} by {loss} at {width} bits"
                result[label] = agreement(one, other, width=width, loss=loss, seed=config.seed)
    return result
