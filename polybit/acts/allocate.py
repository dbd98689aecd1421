"""Spend a budget of bits on the layers that need them: read harms, solve, improve, prove, write the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from polybit.acts.allocate_mix import mixed, refuse_idle
from polybit.acts.allocate_proof import agreements, layer_rows, prove
from polybit.acts.float_source import FloatSource, is_own_text, open_fitting, writer
from polybit.allocate.budget import bits_of, check_mean, choices_of, pinned
from polybit.allocate.costs import harms
from polybit.allocate.groups import fused_groups
from polybit.allocate.knapsack import solve
from polybit.allocate.swap import improve
from polybit.compress import text
from polybit.core.affine import Grid, ZeroKind
from polybit.core.plan import Plan
from polybit.core.precision import Precision, parse_widths
from polybit.core.records import Run, read_run
from polybit.core.runtime import atomic_path, write_json
from polybit.data.table import EMBEDDED_TASKS
from polybit.hub.models import is_embedded, own_name, resolve
from polybit.hub.workers import Team, Where
from polybit.measure.kept import MeasuredSignals, SensitivityTask, default_cache, measured
from polybit.measure.plan_loss import PlanLoss, PlanReader
from polybit.measure.plan_score import PlanScore, ReadPlans
from polybit.measure.probe import ProbeText
from polybit.measure.probe_texts import ProbePair, check_names, general_probe, task_probe
from polybit.measure.quantizing import Quantizing, knobs_of, measurable
from polybit.measure.table import SIGNALS
from polybit.nn.convert import Target, targets
from polybit.options.allocate import AUTO_MIX, AllocateOptions, read_pin
from polybit.options.checks import plain
from polybit.report.allocation import page
from polybit.report.plots import figure

SWEEPS = 2  # of descent after GPTQ: ranks layers like 6 (tau 0.9 even with 0) in a third of the seconds


def allocate(model: str, options: AllocateOptions) -> Run:
    """Spend `bits` per weight on the layers of MODEL where the tasks and the general text need them.

    Writes a plan for `quantize`. Sensitivities are measured once and kept for every later budget; interrupted runs go
    on where they stopped.
    """
    Grid(min(parse_widths(options.widths)), options.group_size)  # a group size that cannot be is said first
    if options.report is not None:
        figure()  # a missing library is said before the work, not after it
    drawn = options.report is not None and options.mix not in (None, AUTO_MIX)
    mixture = read_run(Path(str(options.mix)), "mix") if drawn else None
    run = Run("allocate", {"model": model, **plain(options)})
    with run.timed():
        document, run.numbers = solved(model, options)
    write_json(options.out, document)
    if options.report is not None:
        mixture = run.to_json() if options.mix == AUTO_MIX else mixture
        with atomic_path(options.report) as staged:
            staged.write_text(page(run.to_json(), mixture), encoding="utf-8")
    return run


def solved(name: str, options: AllocateOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the plan's document, the run's numbers)."""
    float_source = open_fitting(name, options, models=Where(options.workers, options.ray).models)
    model = float_source.model.requires_grad_(False)
    chosen = measurable(model, name)
    total = sum(target.size for target in chosen)
    quantizing = quantizing_of(options)
    bits = quantizing.bits(chosen)
    check_mean(options.bits, bits, total, options.group_size)
    pins = pinned([read_pin(pin) for pin in options.pin or ()], list(bits), quantizing.widths)
    asked = asked_texts(name, options)
    refuse_idle(options, asked[1], quantizing)
    general, tasks = read_texts(float_source, name, asked, options)
    calibration, mixture = tuple(batch for pair in general for batch in pair.calibration), None
    if options.mix == AUTO_MIX:
        texts, questions = dict(zip(asked[0], general, strict=True)), dict(zip(asked[1], tasks, strict=True))
        calibration, mixture = mixed(float_source, chosen, texts, questions, options)
    found = read_harms(float_source, name, chosen, [*general, *tasks], calibration, quantizing, options)
    labels = [pair.search.name for pair in general], [pair.search.name for pair in tasks]
    table = harms({probe: s.table(options.signal) for probe, s in found.signals.items()}, *labels, options.beta)
    choices, groups = choices_of(bits, table, pins), fused_groups(bits, free=options.free_groups)
    plan, steps = solve(choices, groups, options.bits * total), {"evaluations": 0, "history": []}
    if options.refine:
        with team(float_source, name, chosen, [pair.search for pair in (*general, *tasks)], found, options) as readers:
            search = PlanScore(reader(readers), found.bank, general=labels[0], tasks=labels[1], beta=options.beta)
            done = improve(plan, choices, groups, options.bits * total, search, evaluations=options.refine)
        plan, steps = done.widths, {"evaluations": done.evaluations, "history": done.history}
    with team(float_source, name, chosen, [pair.proof for pair in (*general, *tasks)], found, options) as readers:
        judge = PlanScore(reader(readers), found.bank, general=labels[0], tasks=labels[1], beta=options.beta)
        free, budgets = choices_of(bits, table, {}), options.budgets
        proved = prove(plan, free, choices, groups, total, judge, budgets=budgets, seed=options.seed)
    losses = SIGNALS[options.sensitivity].losses
    document = {
        "made_for": {"model": own_name(name), "layers": len(chosen), "weights": total},
        "bits_per_weight": round(bits_of(plan, choices) / total, 4),
        "group_size": options.group_size,
        "zero": quantizing.zero,
        "better_than_uniform": proved.beside["better_than_uniform"],
        "plan": plan_json(plan, [t.name for t in targets(model) if t.name not in plan]),
    }
    numbers = {
        "budget": options.bits,
        "bits_per_weight": bits_of(plan, choices) / total,
        "group_size": options.group_size,
        "zero": quantizing.zero,
        "layers": layer_rows(chosen, plan, groups, found.signals, losses),
        "layers_by_width": {str(w): n for w, n in sorted(Counter(plan.values()).items())},
        "tasks": labels[1],
        "general": labels[0],
        "agreement": agreements(found.signals, *labels, losses=losses, seed=options.seed),
        "cost": found.cost,
        "refinement": steps,
        "proof": proved.beside,
        "front": proved.front,
        "plan": document["plan"],
        **({} if mixture is None else {"mixture": mixture.to_json()}),
    }
    return document, numbers


def quantizing_of(options: AllocateOptions) -> Quantizing:
    """How layers are harmed while sensitivities are read."""
    zero: ZeroKind = "group" if options.asymmetric else "centre"  # as the file that learned rounding makes
    widths = tuple(sorted(parse_widths(options.widths)))
    knobs = knobs_of(options.method, descent_sweeps=SWEEPS)
    return Quantizing(widths, options.method, options.group_size, zero, knobs)


def asked_texts(name: str, options: AllocateOptions) -> tuple[list[str], list[str]]:
    """Names of (general texts, tasks), as they were given or as the model has them."""
    embedded = is_embedded(name)
    general = [
        text.auto_source(embedded=embedded) if source == text.AUTO else source
        for source in options.general or [text.AUTO]
    ]
    return general, options.tasks if options.tasks is not None else (list(EMBEDDED_TASKS) if embedded else [])


def read_texts(
    float_source: FloatSource, name: str, asked: tuple[list[str], list[str]], options: AllocateOptions
) -> tuple[list[ProbePair], list[ProbePair]]:
    """(general texts, tasks), part of each kept for the proof."""
    model, tokenizer, embedded = float_source.model, float_source.tokenizer, is_embedded(name)
    length = text.window_length(model, options.window)
    sources, questions = asked
    each = options.calibration_samples if options.mix == AUTO_MIX else -(-options.calibration_samples // len(sources))
    writes = any(is_own_text(source, embedded=embedded) for source in sources)
    with writer(name, float_source, options, writes=writes) as author:
        general = [
            general_probe(
                author,
                tokenizer,
                source,
                samples=options.samples,
                calibrate=each,
                length=length,
                seed=options.seed,
                embedded=embedded,
            )
            for source in sources
        ]
    tasks = [
        task_probe(model, tokenizer, source, items=options.items, length=length, seed=options.seed)
        for source in questions
    ]
    check_names([*general, *tasks])
    return general, tasks


def read_harms(
    float_source: FloatSource,
    name: str,
    chosen: Sequence[Target],
    texts: Sequence[ProbePair],
    calibration: tuple[Tensor, ...],
    quantizing: Quantizing,
    options: AllocateOptions,
) -> MeasuredSignals:
    """Sensitivities of the layers on all texts, from the cache where they were measured before."""
    task = SensitivityTask(
        float_source.by_name(name, options),
        tuple(chosen),
        tuple(pair.search for pair in texts),
        calibration,
        quantizing,
        options.sensitivity,
        options.seed,
    )
    cache = options.cache or default_cache()
    more: dict[str, Any] = {"where": Where(options.workers, options.ray), "restart": options.restart}
    return measured(float_source.model, task, float_source.digest(), cache, **more, **float_source.where)


def team(
    float_source: FloatSource,
    name: str,
    chosen: Sequence[Target],
    probes: Sequence[ProbeText],
    found: MeasuredSignals,
    options: AllocateOptions,
) -> Team:
    """Who reads whole plans on the probes: this process, or workers that find the codes in the cache."""
    folder = Path(found.cost["kept_at"]).absolute()
    return Team(
        PlanReader,
        (float_source.by_name(name, options), tuple(probes), tuple(chosen), folder),
        Where(options.workers, options.ray),
        here=PlanLoss(float_source.model, probes, chosen, found.bank, **float_source.where),
        shared=folder,
        models=[resolve(name)],
    )


def reader(readers: Team) -> ReadPlans:
    """Reads plans and shows how far it is."""
    return lambda plans: readers.in_order(plans, label="plans measured")


def plan_json(plan: Mapping[str, int], outside_blocks: Sequence[str]) -> dict[str, Any]:
    """The plan as it is written: every layer by name, no default, so that a layer left out is noticed."""
    layers = {layer: Precision(w=width) for layer, width in plan.items()} | dict.fromkeys(outside_blocks, Precision())
    value = Plan(layers=layers).to_json()
    value.pop("default")
    return value
