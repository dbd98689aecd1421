"""Bits spent where tasks need them against bits spent evenly: rankings, a plan, and the same exam for all."""

from __future__ import annotations

from functools import partial
from typing import Any

from polybit.acts.allocate import allocate
from polybit.acts.quantize import quantize
from polybit.acts.study_answers import Exam, Told, examined
from polybit.acts.study_exam import made, opened
from polybit.acts.study_kept import kept
from polybit.acts.study_paired import compared
from polybit.compress.sizes import stored_bits_per_weight
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model
from polybit.options.allocate import AllocateOptions
from polybit.options.checks import names_of, plain, seeds_of
from polybit.options.quantize import QuantizeOptions
from polybit.options.study import StudyOptions


def answers(model: str, options: StudyOptions) -> dict[str, Any]:
    """Everything the page says, each part from its own file when it is there."""
    exam, asked, floats = opened(model, options)
    out = options.out
    spent = kept(out / "allocate.json", lambda: planned(model, options))
    measured: dict[str, Told] = {"float": floats}
    pairs: dict[str, tuple[str, str]] = {}
    for seed in seeds_of(options.seeds):
        end = f" seed {seed}" if seed else ""
        ours = {f"plan {options.budget:g} {method}{end}": method for method in names_of(options.planned_by)}
        even = {f"{method} w{options.uniform_bits}{end}": method for method in names_of(options.uniform)}
        for label, method in (ours | even).items():
            path = out / "measured" / f"{label.replace(' ', '-')}.json"
            made_by = partial(measure, model, method, seed, label, exam, options, planned=label in ours)
            measured[label] = kept(path, made_by)
        pairs |= {f"{one} against {other}": (one, other) for one in ours for other in even}
    return {
        "model": model,
        "config": plain(options),
        "asked": asked,
        **{name: spent[name] for name in ("agreement", "layers_by_width", "proof")},
        **compared(measured, pairs),
    }


def planned(model: str, options: StudyOptions) -> dict[str, Any]:
    """The numbers of allocate; the plan lies beside them."""
    how = AllocateOptions(
        bits=options.budget,
        out=options.out / "plan.json",
        tasks=names_of(options.tasks) or None,
        general=names_of(options.general) or None,
        sensitivity=options.sensitivity,
        items=options.task_items,
        method=options.ranked_by,
        cache=options.out / "sensitivity",
        calibration_samples=options.samples,
        **options.told("samples", "beta", "window", "group_size", "trust_remote_code"),
    )
    return allocate(model, how).numbers


def measure(
    model: str, method: str, seed: int, label: str, exam: Exam, options: StudyOptions, *, planned: bool
) -> Told:
    """Quantize by a method, as planned or evenly, and examine. What is planned is calibrated on the mixture, if any."""
    out = options.out / "quantized" / label.replace(" ", "-")
    which: dict[str, Any] = {"bits": options.uniform_bits}
    text = options.told("calibration", "samples")
    if planned:
        which = {"plan": options.out / "plan.json", "asymmetric": False}
        if options.mix is not None:
            text = {"mix": options.mix, "samples": options.mix_samples or options.samples}
    which |= {"method": method, "seed": seed, **text}
    how = options.told("window", "group_size", "trust_remote_code")
    made(out, lambda: quantize(model, QuantizeOptions(out=out, ends=16, measure=False, **which, **how)))
    lm = LocalLM(*open_model(str(out), trust_remote_code=options.trust_remote_code))
    with lm.at(None if planned else f"w{options.uniform_bits}"):
        return {"bits": stored_bits_per_weight(lm.model), **examined(lm, exam, label)}
