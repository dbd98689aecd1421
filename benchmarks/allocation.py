"""What allocating bits is worth: against uniform widths, random plans, one signal at a time, and four-bit quantizers.

    python benchmarks/allocation.py headline stories260K --general train.txt --text validation.txt --bits 3.463
    python benchmarks/allocation.py ablation tinychat --general embedded --tasks arithmetic reading dialogue --seeds 0 1
    python benchmarks/allocation.py versus tinychat --general embedded --tasks arithmetic reading dialogue --seeds 0 1

headline: learned rounding of an allocated plan against uniform 3 and 4 bits, protocol of benchmarks/quality.py (128
calibration windows, 392 evaluation windows); CPU seconds from the loaded float model to the codes, all in them.
ablation: plans of equal effective bits with GPTQ codes: line between uniform widths, 20 random plans, general text
only, tasks only, both at beta 0.3 and 0.7, and the last refined by measuring. versus: the mixed plan against uniform
4-bit RTN, HQQ, GPTQ and AWQ on tasks. A seed draws calibration windows, sensitivity items and random plans; what is
measured is the same for all seeds: items of another seed and, for answers, names no training text had.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polybit.allocate.budget import choices_of, even
from polybit.allocate.costs import clean, combine, mean_tables, rescaled
from polybit.allocate.groups import fused_groups
from polybit.allocate.knapsack import solve
from polybit.allocate.swap import improve
from polybit.compress.refine import FINISH, finish_model
from polybit.compress.source import IN_MEMORY, SourceName
from polybit.core.records import machine
from polybit.core.runtime import write_json
from polybit.data.answers import encode_task, read_task
from polybit.data.text import read_windows
from polybit.hub.load import load_float
from polybit.hub.models import resolve
from polybit.measure.block_files import KeptCodes, unpacked
from polybit.measure.kept import SensitivityTask, run
from polybit.measure.passage import weights_of
from polybit.measure.plan_loss import PlanLoss
from polybit.measure.probe import ProbeText, answer_probe, text_probe
from polybit.measure.quantizing import Quantizing, knobs_of, measurable
from polybit.measure.signals import Signal, agreement, gather, kendall, scores
from polybit.quant.table import LAYERWISE

WIDTHS = (2, 3, 4, 5, 6)
SWEEPS = 2  # of descent after GPTQ: a third of the seconds, the same ranking of layers
HELD = 90  # seed of measured items


class Bench:
    """One model with its texts for one seed."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.model, self.tokenizer = load_float(resolve(args.model))
        self.model.requires_grad_(False)
        self.targets = measurable(self.model, args.model)
        self.total = sum(t.size for t in self.targets)
        draw, _ = read_windows(args.general, self.tokenizer, args.window, count=args.calibration_windows, seed=seed)
        self.calibration = tuple(draw.split(4))
        self.general = text_probe("general", draw[: args.samples])
        self.tasks = [self.task(name, args.items, seed) for name in args.tasks]

    def task(self, name: str, items: int, seed: int) -> ProbeText:
        """Items of one task as a probe."""
        found = read_task(name, count=items, seed=seed)
        rows = encode_task(self.tokenizer, found, most=self.args.window)
        return answer_probe(found.name, rows, padding=self.tokenizer.pad_token_id or 0)

    def measure(self, quantizing: Quantizing, how: str = "exact", probes: tuple[ProbeText, ...] | None = None):
        """(signals, bank, CPU seconds, share of the naive block forwards)."""
        probes = probes or (self.general, *self.tasks)
        task = SensitivityTask(
            SourceName(self.args.model),
            tuple(self.targets),
            probes,
            self.calibration,
            quantizing,
            how,
            self.seed,
        )
        began = time.process_time()
        folder = Path(self.args.work) / f"{Path(self.args.model).name}-{how}-{self.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for index, content in run(self.model, task, range(10**6), IN_MEMORY, None):
            files.append(folder / f"{index}.npz")
            files[-1].write_bytes(content)
        seconds = time.process_time() - began
        readings = [unpacked(file)[0] for file in files]
        bank = KeptCodes(files)
        naive = sum(r.naive for r in readings)
        share = sum(r.work for r in readings) / naive if naive else math.nan
        return gather(readings, {t.name: t.size for t in self.targets}), bank, seconds, share


def headline(args: argparse.Namespace) -> dict[str, Any]:
    """Learned rounding of allocated plans and of uniform widths."""
    bench = Bench(args, args.seeds[0])
    held_out, _ = read_windows(args.text, bench.tokenizer, args.window, count=args.windows)
    judge = PlanLoss(bench.model, [text_probe("text", held_out, batch=8)], bench.targets, {})
    quantizing = Quantizing(WIDTHS, "gptq", args.group_size, "centre", knobs_of("gptq", descent_sweeps=SWEEPS))
    signals, bank, seconds, share = bench.measure(quantizing, probes=(bench.general,))
    table = clean(signals["general"].table())
    choices = choices_of(quantizing.bits(bench.targets), table, {})
    search = PlanLoss(bench.model, [bench.general], bench.targets, bank)
    rows = []
    for free in (False, True) if args.plans == "both" else (args.plans == "free",):
        groups = fused_groups((t.name for t in bench.targets), free=free)
        began = time.process_time()
        plan = solve(choices, groups, args.bits * bench.total)
        losses = lambda plans: [search(widths)["general"].kl for widths in plans]  # noqa: E731
        found = improve(plan, choices, groups, args.bits * bench.total, losses, evaluations=args.refine)
        spent = time.process_time() - began
        rows.append(
            finish(bench, f"allocated, {'free' if free else 'fused'}", found.widths, bank, judge, seconds + spent)
        )
        print_row(rows[-1])
    for width in args.uniform:
        rows.append(finish(bench, f"uniform w{width}", dict.fromkeys(bank, width), bank, judge, 0.0))
        print_row(rows[-1])
    return {"rows": rows, "share_of_naive": share, "sensitivity_seconds": seconds}


def finish(bench: Bench, label: str, plan: dict[str, int], bank, judge: PlanLoss, before: float) -> dict[str, Any]:
    """Learned rounding from the bank's codes at a plan, measured."""
    start = {name: bank[name][width] for name, width in plan.items()}
    began = time.process_time()
    done = finish_model(
        bench.model, list(bench.calibration), bench.targets, start, tuning=replace(FINISH, steps=130, seed=bench.seed)
    )
    seconds = time.process_time() - began + before
    reading = judge.read(weights_of({name: q.dequantize() for name, q in done.items()}))["text"]
    per_window = reading.kl_N / reading.tokens_N
    count = {name: q.codes_OI.numel() for name, q in done.items()}
    bits = sum(q.bits_per_weight() * count[name] for name, q in done.items()) / sum(count.values())
    error = float(per_window.std(ddof=1) / len(per_window) ** 0.5)
    return {"name": label, "bits": bits, "kl": reading.kl, "error": error, "cpu_seconds": seconds, "plan": plan}


def print_row(row: dict[str, Any]) -> None:
    """One line of Markdown."""
    print(
        f"| {row['name']} | {row['bits']:.3f} | {row['kl']:.4f} ±{row['error']:.4f} | {row['cpu_seconds']:.0f} |",
        flush=True,
    )


def tables_of(signals: dict[str, Signal], tasks: list[str]):
    """beta -> table of harms."""
    general = rescaled(clean(signals["general"].table()), "minmax")
    task = mean_tables([rescaled(clean(signals[name].table()), "minmax") for name in tasks])
    return {beta: combine(task, general, beta) for beta in (0.0, 0.3, 0.7, 1.0)}


def random_plan(choices, groups, budget: float, rng: random.Random, widths: tuple[int, ...]) -> dict[str, int]:
    """Random ones of neighbouring widths that use up the budget: nothing fits any more."""
    picked = [rng.choice(widths) for _ in groups]

    def bits() -> float:
        return sum(choices[n][w].bits for g, w in zip(groups, picked, strict=True) for n in g)

    while bits() > budget:
        at = rng.randrange(len(groups))
        picked[at] = max(widths[0], picked[at] - 1)
    for at in rng.sample(range(len(groups)), len(groups)) * 2:
        picked[at] += 1
        if picked[at] > widths[-1] or bits() > budget:
            picked[at] -= 1
    return {name: width for group, width in zip(groups, picked, strict=True) for name in group}


def ablation(args: argparse.Namespace) -> dict[str, Any]:
    """Plans of equal bits from different signals, one result per seed."""
    seeds = []
    for seed in args.seeds:
        seeds.append(compare_plans(Bench(args, seed)))
        print_ablation(seeds[-1])
        if args.json:
            write_json(args.json, json.loads(json.dumps({"config": settings(args), "seeds": seeds})))
    return {"seeds": seeds}


def compare_plans(bench: Bench) -> dict[str, Any]:
    """All plans of one seed, measured on the same text."""
    args = bench.args
    quantizing = Quantizing(WIDTHS, "gptq", args.group_size, "centre", knobs_of("gptq", descent_sweeps=SWEEPS))
    signals, bank, seconds, share = bench.measure(quantizing)
    cheap, cheap_seconds = signals, 0.0
    if not args.skip_gradient:
        cheap, _, cheap_seconds, _ = bench.measure(quantizing, how="gradient")
    names = [probe.name for probe in bench.tasks]
    held = [text_probe("general", held_text(bench)), *(bench.task(name, args.held_items, HELD) for name in args.tasks)]
    judge = PlanLoss(bench.model, held, bench.targets, bank)
    groups = fused_groups((t.name for t in bench.targets), free=args.plans == "free")
    plans, choices = solved_plans(bench, quantizing, groups, signals, cheap)
    plans["both, beta 0.7, refined"] = exchanged(bench, bank, choices, groups, plans["both, beta 0.7"])

    def read(plan: dict[str, int]) -> dict[str, float]:
        found = judge(plan)
        bits = sum(choices[n][w].bits for n, w in plan.items()) / bench.total
        task, nll = (float(np.mean([getattr(found[n], loss) for n in names])) for loss in ("kl", "nll"))
        return {"bits": bits, "general": found["general"].kl, "task": task, "task_nll": nll}

    rng = random.Random(bench.seed)
    least = sum(choices[n][WIDTHS[0]].bits for n in choices) / bench.total - WIDTHS[0]
    near = (int(args.bits - least), int(args.bits - least) + 1)  # the two widths an even plan would mix
    drawn, drawn_near = (
        [read(random_plan(choices, groups, args.bits * bench.total, rng, widths)) for _ in range(args.random)]
        for widths in (WIDTHS[:-1], near)
    )
    return {
        "seed": bench.seed,
        "rows": {label: read(plan) for label, plan in plans.items()},
        "uniform": {w: read(dict.fromkeys(bank, w)) for w in WIDTHS},
        "random": drawn,
        "random_near": drawn_near,
        "exact_seconds": seconds,
        "gradient_seconds": cheap_seconds,
        "share_of_naive": share,
        "gradient_ranks": {n: kendall(*(scores(s[n].mean(), WIDTHS, 3) for s in (signals, cheap))) for n in signals},
        "agreement": {
            f"{n} {loss}": agreement(signals["general"], signals[n], width=3, loss=loss)  # type: ignore
            for n in names
            for loss in ("kl", "nll")
        },
    }


def solved_plans(bench: Bench, quantizing: Quantizing, groups, signals, cheap) -> tuple[dict[str, Any], Any]:
    """Plans by label, and the choices they were solved with."""
    names, budget = [probe.name for probe in bench.tasks], bench.args.bits * bench.total
    tables = tables_of(signals, names)
    choices = {beta: choices_of(quantizing.bits(bench.targets), table, {}) for beta, table in tables.items()}
    labels = {"general only": 0.0, "both, beta 0.3": 0.3, "both, beta 0.7": 0.7, "tasks only": 1.0}
    plans = {label: solve(choices[beta], groups, budget) for label, beta in labels.items()}
    if cheap is not signals:
        quick = choices_of(quantizing.bits(bench.targets), tables_of(cheap, names)[0.7], {})
        plans["both, beta 0.7, from gradients"] = solve(quick, groups, budget)
    return plans, choices[0.7]


def exchanged(bench: Bench, bank, choices, groups, start: dict[str, int]) -> dict[str, int]:
    """A plan after exchanges measured on the text of the sensitivities."""
    if not bench.args.refine:
        return start
    search = PlanLoss(bench.model, [bench.general, *bench.tasks], bench.targets, bank)
    base = {probe: r.kl for probe, r in search(start).items()}

    def loss(plan) -> float:
        found = search(plan)
        task = np.mean([found[probe.name].kl / base[probe.name] for probe in bench.tasks])
        return float(0.7 * task + 0.3 * found["general"].kl / base["general"])

    budget = bench.args.bits * bench.total
    losses = lambda plans: [*map(loss, plans)]  # noqa: E731
    return improve(start, choices, groups, budget, losses, evaluations=bench.args.refine).widths


def held_text(bench: Bench):
    """Windows of general text for the measuring, of a text of its own where one is given."""
    source = bench.args.text or bench.args.general
    return read_windows(source, bench.tokenizer, bench.args.window, count=bench.args.windows)[0]


def print_ablation(result: dict[str, Any]) -> None:
    """One seed as Markdown: KL on tasks and general text, and how many random plans each beats."""
    print(
        f"\nseed {result['seed']}: exact {result['exact_seconds']:.0f} s, {result['share_of_naive']:.3f} of naive; "
        f"gradients {result['gradient_seconds']:.0f} s, ranks {result['gradient_ranks']}"
    )
    points = list(result["uniform"].values())
    for label, row in [*result["rows"].items(), *((f"uniform w{w}", r) for w, r in result["uniform"].items())]:
        beaten = {
            k: [100 * np.mean([row[k] < other[k] for other in result[kind]]) for kind in ("random", "random_near")]
            for k in ("task", "general")
        }
        line = {k: even(row["bits"], [(p["bits"], p[k]) for p in points]) for k in ("task", "general")}
        cells = [f"{row[k]:.4f} | {line[k]:.4f} | {beaten[k][0]:.0f} %, {beaten[k][1]:.0f} %" for k in beaten]
        print(f"| {label} | {row['bits']:.3f} | {' | '.join(cells)} |", flush=True)
    for kind in ("random", "random_near"):
        for key in ("task", "general"):
            values = sorted(row[key] for row in result[kind])
            print(f"{kind} {key}: best {values[0]:.4f}, median {values[len(values) // 2]:.4f}", flush=True)
    for label, row in result["agreement"].items():
        print(f"tau {label}: {row['tau']}, halves {row['reliability']}", flush=True)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The command line and the machine."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "act"}
    return {**plain, "machine": machine()}


def versus(args: argparse.Namespace) -> dict[str, Any]:
    """The mixed plan against uniform four-bit quantizers: task KL and exact answers."""
    from polybit.compress.blocks import as_stored
    from polybit.compress.stats import collect
    from polybit.evals import tasks as tasks_of
    from polybit.evals.scoring import bootstrap
    from polybit.hub.lm import LocalLM

    found = []
    for seed in args.seeds:
        bench = Bench(args, seed)
        quantizing = Quantizing(WIDTHS, "gptq", args.group_size, "centre", knobs_of("gptq", descent_sweeps=SWEEPS))
        signals, bank, _, _ = bench.measure(quantizing)
        names = [probe.name for probe in bench.tasks]
        choices = choices_of(quantizing.bits(bench.targets), tables_of(signals, names)[0.7], {})
        groups = fused_groups(t.name for t in bench.targets)
        plan = solve(choices, groups, args.bits * bench.total)
        stats = collect(bench.model, bench.calibration, bench.targets)
        start = {name: bank[name][width] for name, width in plan.items()}
        rows = {"mixed, gptq": start}
        rows["mixed, learned rounding"] = finish_model(
            bench.model, list(bench.calibration), bench.targets, start, tuning=replace(FINISH, steps=130, seed=seed)
        )
        four = Quantizing((4,), "gptq", args.group_size, "group")
        for method in LAYERWISE:
            asked = replace(four, method=method)
            given = {t.name: (stats[t.name] if asked.needs_stats else None) for t in bench.targets}
            rows[f"uniform 4, {method}"] = {
                t.name: asked.codes(t.weight_OI(bench.model), given[t.name])[4] for t in bench.targets
            }
        held = [bench.task(name, args.held_items, HELD) for name in args.tasks]
        judge = PlanLoss(bench.model, held, bench.targets, {})
        items = {k: v for k, v in tasks_of.embedded_items(args.score_items, seed=HELD).items() if k in args.tasks}
        gold = {name: tasks_of.gold(rows_of) for name, rows_of in items.items()}
        before = {t.name: t.parameter(bench.model).data.clone() for t in bench.targets}
        for label, codes in [("float", None), *rows.items()]:
            row: dict[str, Any] = {"seed": seed, "name": label}
            if codes is not None:
                dense = {name: q.dequantize() for name, q in codes.items()}
                row["task_kl"] = float(np.mean([r.kl for r in judge.read(weights_of(dense)).values()]))
                row["bits"] = sum(q.bits_per_weight() * q.codes_OI.numel() for q in codes.values()) / bench.total
                for t in bench.targets:
                    t.parameter(bench.model).data = as_stored(t, dense[t.name], bench.model)
            lm = LocalLM(bench.model, bench.tokenizer)
            for name, rows_of in items.items():
                answered = tasks_of.score(tasks_of.predict(lm, name, tasks_of.questions(rows_of)), gold[name])
                row[name] = bootstrap(answered[tasks_of.TASKS[name].correct]).to_json()
            for t in bench.targets:
                t.parameter(bench.model).data = before[t.name]
            found.append(row)
            shown = " | ".join(f"{100 * row[name]['value']:.1f}" for name in items)
            print(
                f"| {seed} | {label} | {row.get('bits', 32):.3f} | {row.get('task_kl', 0):.5f} | {shown} |", flush=True
            )
        if args.json:
            write_json(args.json, json.loads(json.dumps({"config": settings(args), "rows": found})))
    return {"rows": found}


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=("headline", "ablation", "versus"))
    parser.add_argument("model")
    parser.add_argument("--general", required=True)
    parser.add_argument("--text", help="text to measure on (headline: required)")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--plans", choices=("fused", "free", "both"), default="fused")
    parser.add_argument("--uniform", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=16, help="windows of general text for sensitivities")
    parser.add_argument("--items", type=int, default=48, help="items per task for sensitivities")
    parser.add_argument("--held-items", type=int, default=100, help="items per task to measure KL on")
    parser.add_argument("--score-items", type=int, default=300, help="items per task to answer")
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--refine", type=int, default=60)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=392)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--skip-gradient", action="store_true", help="exact sensitivities only")
    parser.add_argument("--work", default="allocation-work", help="directory for measured blocks")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run one act."""
    args = arguments()
    torch.set_num_threads(1)
    found = {"headline": headline, "ablation": ablation, "versus": versus}[args.act](args)
    if args.json:
        write_json(args.json, json.loads(json.dumps({"config": settings(args), **found})))


if __name__ == "__main__":
    main()
