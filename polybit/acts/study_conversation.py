"""Does conversation suffer before accuracy does, and what mends it? Quantize, align, and measure both beside the float
model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polybit.acts.align import align
from polybit.acts.pairs import pairs
from polybit.acts.quantize import quantize
from polybit.acts.study_answers import Exam, Told, examined
from polybit.acts.study_exam import made, opened
from polybit.acts.study_kept import kept
from polybit.acts.study_paired import compared
from polybit.compress.sizes import preset_sizes
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model
from polybit.options.align import AlignOptions
from polybit.options.checks import names_of, plain, seeds_of
from polybit.options.pairs import PairsOptions
from polybit.options.quantize import QuantizeOptions
from polybit.options.study import StudyOptions
from polybit.quant.table import NESTED

WIDEST = 8  # bits that a nested file always has


@dataclass(frozen=True, slots=True)
class AnswerArm:
    """One model that is measured. start: the label of what it was aligned from; objective, seed: of alignment."""

    label: str
    method: str
    bits: int
    start: str = ""
    objective: str = ""
    seed: int = 0

    @property
    def slug(self) -> str:
        """The name of its files."""
        return self.label.replace(" ", "-").replace("+", "and")


def answers(model: str, options: StudyOptions) -> dict[str, Any]:
    """Everything the page says, each part from its own file when it is there."""
    exam, told, floats = opened(model, options)
    measured: dict[str, Told] = {"float": floats}
    arms = arms_of(options)
    for arm in arms:
        path = options.out / "measured" / f"{arm.slug}.json"
        measured[arm.label] = kept(path, partial(measure, model, arm, exam, options))
    return {
        "model": model,
        "config": plain(options),
        "asked": told,
        "arms": {
            arm.label: {
                "method": arm.method, "width": arm.bits, "start": arm.start, "objective": arm.objective,
                "seed": arm.seed,
            } for arm in arms
        },
        **compared(measured, {arm.label: (arm.label, arm.start) for arm in arms if arm.start}),
    }  # fmt: skip


def arms_of(options: StudyOptions) -> list[AnswerArm]:
    """Quantizers by width, then what is aligned from some of them."""
    found = [
        AnswerArm(f"{method} w{bits}", method, int(bits))
        for bits in names_of(options.bits)
        for method in names_of(options.quantizers)
    ]
    for seed in seeds_of(options.seeds):
        for bits in names_of(options.aligned_bits):
            for method in names_of(options.starts):
                for objective in names_of(options.objectives):
                    start = f"{method} w{bits}"
                    label = f"{start} {objective}" + (f" seed {seed}" if seed else "")
                    found.append(AnswerArm(label, method, int(bits), start, objective, seed))
    return found


def measure(model: str, arm: AnswerArm, exam: Exam, options: StudyOptions) -> Told:
    """Make an arm where it is not there yet, and examine it."""
    path = aligned(model, arm, options) if arm.objective else quantized(model, arm.method, arm.bits, options)
    lm = LocalLM(*open_model(str(path), trust_remote_code=options.trust_remote_code))
    preset = f"w{arm.bits}"
    bits = preset_sizes(lm.model, [preset])[preset]["bits_per_weight"]
    with lm.at(preset):
        return {"bits": bits, **examined(lm, exam, arm.label)}


def quantized(model: str, method: str, bits: int, options: StudyOptions) -> Path:
    """A checkpoint by one method, its embedding and head in float as alignment wants them."""
    nested = method in NESTED
    out = options.out / "quantized" / (method if nested else f"{method}-w{bits}")
    widths = ",".join(map(str, sorted({WIDEST, *map(int, names_of(options.bits))}, reverse=True)))
    which: dict[str, Any] = {"widths": widths} if nested else {"bits": bits}
    told = options.told("calibration", "samples", "window", "group_size", "trust_remote_code")
    how = QuantizeOptions(out=out, method=method, ends=16, measure=False, **which, **told)
    return made(out, partial(quantize, model, how))


def aligned(model: str, arm: AnswerArm, options: StudyOptions) -> Path:
    """A checkpoint aligned from a quantizer's, whose own answers are made while it is trained; plain rounding starts
    from the float model itself, as align does."""
    source = model if arm.method == "rtn" else str(quantized(model, arm.method, arm.bits, options))
    out, asked = options.out / "aligned" / arm.slug, options.out / "pairs"
    shared: dict[str, Any] = {"precision": f"w{arm.bits}", **options.told("group_size", "trust_remote_code")}
    prompts = str(options.out / "train.jsonl")
    asking = PairsOptions(
        prompts=prompts, out=asked, shard=64, max_tokens=options.max_tokens, float_only=True, **shared
    )
    made(asked, partial(pairs, model, asking))
    told = options.told("steps", "batch", "learning_rate")
    how = AlignOptions(out=out, pairs=asked, method=arm.objective, seed=arm.seed, **shared, **told)
    return made(out, partial(align, source, how))
