"""The questions about switchable precision, answered for one model: quantize, train, score, search, attack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.acts.attack import attack
from polybit.acts.frontier import frontier
from polybit.acts.quantize import quantize
from polybit.acts.study_kept import kept
from polybit.acts.study_scores import StudyRow, score_all
from polybit.acts.table import ARMS, BASELINE
from polybit.acts.train import train
from polybit.compress.plan_files import read_presets
from polybit.core.plan import Plan
from polybit.options.attack import AttackOptions
from polybit.options.checks import names_of, plain, seeds_of
from polybit.options.frontier import FrontierOptions
from polybit.options.quantize import QuantizeOptions
from polybit.options.study import StudyOptions
from polybit.options.train import TrainOptions

SAME_IN_ALL = (  # what every arm is told, as the study is; an arm says the rest
    "presets", "data", "steps", "batch", "learning_rate", "labels", "rows", "length", "cycles", "teacher", "group_size",
    "trust_remote_code",
)  # fmt: skip
WIDEST = 8  # bits that are always stored, so that every width can be read


@dataclass(frozen=True, slots=True)
class Trained:
    """One arm with one seed: where it lies, and the JSON of its run."""

    arm: str
    seed: int
    path: Path
    run: dict[str, Any]

    def at(self, preset: str) -> Path:
        """The checkpoint that answers at a preset: arms that train each preset alone have one for each."""
        alone = self.path / preset
        return alone if alone.is_dir() else self.path


def answers(model: str, options: StudyOptions) -> dict[str, Any]:
    """Quantize, train in every way, score, search, attack: all the page says, each part from its own file when it is
    there."""
    plans = read_presets(options.presets)
    out, seeds = options.out, seeds_of(options.seeds)
    start = quantized(model, options, plans)
    runs = [trained(start, arm, seed, options) for seed in seeds for arm in names_of(options.arms)]
    main = str(out / f"{BASELINE}-{seeds[0]}")
    return {
        "model": model,
        "config": plain(options),
        "presets": {name: str(plan.default) for name, plan in plans.items()},
        "scores": score_all(scored(model, start, runs, plans), options, list(plans)),
        "seconds": {
            f"{one.arm}-{one.seed}": one.run["numbers"].get("training_seconds", one.run["seconds"]) for one in runs
        },
        "loss": {f"{one.arm}-{one.seed}": one.run["numbers"]["presets"] for one in runs},
        "frontier": kept(out / "frontier.json", lambda: searched(main, options, plans)),
        "attack": kept(out / "attack.json", lambda: attacked(main, options, plans)),
    }


def quantized(model: str, options: StudyOptions, plans: dict[str, Plan]) -> str:
    """The checkpoint every arm starts from: post-training quantization at all weight widths of the presets."""
    out = options.out / "quantized"
    widths = sorted({plan.default.w for plan in plans.values()} | {WIDEST}, reverse=True)
    which: dict[str, Any] = {"widths": ",".join(map(str, widths))} if len(widths) > 1 else {"bits": widths[0]}
    if not out.is_dir():
        shared = {name: getattr(options, name) for name in ("group_size", "trust_remote_code")}
        quantize(model, QuantizeOptions(out=out, measure=False, **shared, **which))
    return str(out)


def trained(start: str, arm: str, seed: int, options: StudyOptions) -> Trained:
    """One arm with one seed."""
    out = options.out / f"{arm}-{seed}"
    told = {name: getattr(options, name) for name in SAME_IN_ALL} | dict(ARMS[arm].told)
    how = TrainOptions(out=out, seed=seed, overwrite=True, probes=0, **told)
    return Trained(arm, seed, out, kept(out.with_suffix(".json"), lambda: train(start, how).to_json()))


def scored(model: str, start: str, runs: list[Trained], plans: dict[str, Plan]) -> list[StudyRow]:
    """All that is asked questions: the float model, and at every preset the start and each trained checkpoint."""
    found = [StudyRow("float", model, None)]
    for name, plan in plans.items():
        precision = str(plan.default)
        found.append(StudyRow(f"quantized {name}", start, precision))
        found += [StudyRow(f"{one.arm} {name}", str(one.at(name)), precision) for one in runs]
    return found


def searched(checkpoint: str, options: StudyOptions, plans: dict[str, Plan]) -> dict[str, Any]:
    """The frontier over the presets' precisions and their crosses, by bit operations."""
    found = [plan.default for plan in plans.values()]
    crossed = {f"w{w}a{a}" for w in {p.w for p in found} for a in {p.a for p in found} if a < 16}
    names = sorted(crossed | {str(p) for p in found})
    how = FrontierOptions(
        out=options.out / "frontier",
        presets=",".join(names),
        cost="bitops",
        windows=4,
        window=96,
        points=6,
        evaluations=options.evaluations,
        trust_remote_code=options.trust_remote_code,
    )
    return frontier(checkpoint, how).numbers


def attacked(checkpoint: str, options: StudyOptions, plans: dict[str, Plan]) -> dict[str, Any]:
    """The transfer matrix of the trained checkpoint, and the verdict on drawing a precision."""
    if not options.attack_items:
        return {}
    names = ",".join(plans)
    how = AttackOptions(squad=options.squad, items=options.attack_items, precision=names, steps=4, tries=8)
    return attack(checkpoint, how).numbers
