"""One model made good at several precisions, saved as one checkpoint with its presets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from polybit.acts.launch import by_processes
from polybit.acts.train_heads import HEADS
from polybit.acts.train_start import Pupil
from polybit.compress.plan_files import read_presets
from polybit.compress.sizes import quantized_layers
from polybit.core.journal import Journal
from polybit.core.plan import Plan
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save, verify
from polybit.hub.directory import ADAPTERS, MANIFEST, check_output
from polybit.hub.models import device_of
from polybit.hub.workspace import Workspace
from polybit.nn.adapters import plug
from polybit.options.checks import plain
from polybit.options.train import TrainOptions
from polybit.train import world
from polybit.train.balance import Balance
from polybit.train.fit import Course
from polybit.train.latent import freeze, latent_layers, quantized_names
from polybit.train.schedules import choose
from polybit.train.table import LESSON_OBJECTIVES

WITHOUT_EFFECT = (
    "out",
    "overwrite",
    "restart",
    "trust_remote_code",
    "presets",
    "device",
    "processes",
)  # on what a run computes
NOTED = ("method", "schedule", "steps", "batch", "learning_rate", "data", "adapter", "seed")  # in the checkpoint


def train(model: str, options: TrainOptions) -> Run:
    """Train MODEL (a float model or a polybit checkpoint) at all presets, so that one file is good at each."""
    return by_processes("polybit.acts.train:train", model, options, trained)


def trained(model: str, options: TrainOptions) -> Run:
    """`train` in one of its processes."""
    run = Run("train", {"model": model, **plain(options)})
    presets = read_presets(options.presets)
    unfit = [name for name in presets if Path(name).name != name or name in (".", "..")]
    if unfit and (options.adapter != "none" or has_folders(options, list(presets))):
        raise PolybitError(f"--presets names {unfit[0]!r:.60}, after which a folder is called: use no / in it")
    check_places(options, list(presets))
    with run.timed():
        if LESSON_OBJECTIVES[options.method].alone:
            run.numbers = each_alone(model, options, presets)
        else:
            run.numbers = one_run(model, options, presets, options.out)
    return run


def check_places(options: TrainOptions, presets: Sequence[str]) -> None:
    """Refuse outputs that cannot or must not be written, unless an interrupted run left them."""
    if not has_folders(options, presets) or (options.out / MANIFEST).is_file():
        check_output(options.out, overwrite=options.overwrite)
        return
    places = [options.out / preset for preset in presets]
    begun = [finished_file(options), *map(Workspace.place, (options.out, *places))]
    if not any(path.exists() for path in begun):
        for place in places:
            check_output(place, overwrite=options.overwrite)


def has_folders(options: TrainOptions, presets: Sequence[str]) -> bool:
    """Whether the output is a folder with a checkpoint for each preset."""
    return LESSON_OBJECTIVES[options.method].alone or (options.adapter == "nested" and len(presets) > 1)


def finished_file(options: TrainOptions) -> Path:
    """Where the numbers of presets that are trained alone are kept until all are."""
    return options.out.with_name(f"{options.out.name}.finished")


def each_alone(model: str, options: TrainOptions, presets: Mapping[str, Plan]) -> dict[str, Any]:
    """A run and a checkpoint for each preset; those that an interrupted run has finished are not trained again."""
    found: dict[str, Any] = {"presets": {}, "saved": [], "training_seconds": 0.0, "kept": {}}
    decides = {"model": model, **flags_of(options), "presets": {name: plan.to_json() for name, plan in presets.items()}}
    journal = Journal(finished_file(options), decides, restart=options.restart)
    keep = journal.put if world.first() else journal.done.__setitem__
    for preset, plan in presets.items():
        place = options.out / preset
        if preset not in journal.done or not place.is_dir():
            one_run(model, options, {preset: plan}, place, partial(keep, preset))
        numbers = journal.done[preset]
        found["presets"] |= numbers["presets"]
        found["saved"].append(str(place))
        found["training_seconds"] += numbers["training_seconds"]
        found["kept"][preset] = numbers["kept"]
    if world.first():
        journal.remove()
    return found


def one_run(
    model: str,
    options: TrainOptions,
    presets: Mapping[str, Plan],
    out: Path,
    note: Callable[[dict[str, Any]], object] = lambda numbers: None,
) -> dict[str, Any]:
    """Load, train, freeze, save; the numbers of the run, which `note` hears before the workspace goes."""
    head = HEADS[options.head]
    pupil = head.pupil(model, options, presets)
    reading = head.reading(pupil, options)
    with world.held(out):
        store = world.workspace(out, fingerprint(options, pupil), restart=options.restart)
        try:
            pupil.model.to(device_of(options.device))
            schedule = choose(
                options.schedule,
                pupil.plans,
                quantized_names(pupil.model),
                steps=options.steps,
                cycles=options.cycles,
                seed=options.seed,
            )
            before = head.measure(pupil, reading)
            objective = head.objective(pupil, options)
            outcome = head.run(pupil, reading, objective, store.path / "run", course(options), schedule)
            after = head.measure(pupil, reading)
            pupil.model.cpu()
            numbers = {
                "presets": {
                    name: {"plan": plan.to_json(), "start": before[name], "end": after[name]}
                    for name, plan in pupil.plans.items()
                },
                "float": before["float"],
                **reading.counts,
                "kept": outcome.kept,
                "training_seconds": round(outcome.seconds, 2),
            }
            numbers["saved"] = save_all(pupil, out, options) if world.first() else []
            note(numbers)
            world.wait()
            store.discard()
        finally:
            store.close()
    return numbers


def course(options: TrainOptions) -> Course:
    """How the run goes."""
    return Course(
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        learning_rate=options.learning_rate,
        probes=options.probes,
        slack=options.slack,
        seed=options.seed,
        balance=Balance(options.balance),
    )


def fingerprint(options: TrainOptions, pupil: Pupil) -> dict[str, Any]:
    """All that decides the result, so that a resumed run cannot mix two."""
    return {
        "model": pupil.digest,
        **flags_of(options),
        "presets": {name: plan.to_json() for name, plan in pupil.plans.items()},
    }


def flags_of(options: TrainOptions) -> dict[str, Any]:
    """The options that have an effect on the result."""
    return {name: value for name, value in plain(options).items() if name not in WITHOUT_EFFECT}


def save_all(pupil: Pupil, out: Path, options: TrainOptions) -> list[str]:
    """Freeze and save: one checkpoint with the LoRA adapters of its presets, or one per preset for codes of its own."""
    notes = {"base_model": pupil.parent, "trained": {name: getattr(options, name) for name in NOTED}}

    def one(frozen: nn.Module, path: Path) -> str:
        wanted = sorted({min(plan.at(n).w for n in layers) for plan in pupil.plans.values()}, reverse=True)
        stored = max(layer.bits for layer in quantized_layers(frozen).values())
        widths = tuple(width for width in wanted if width <= stored) or (stored,)
        more: dict[str, Any] = {"widths": widths, "notes": notes, "overwrite": options.overwrite}
        if not (path.is_dir() and not options.overwrite and saved_before(frozen, path)):
            save(frozen, path, tokenizer=pupil.tokenizer, verified=True, **more)
        return str(path)  # as it was given

    model, layers = pupil.model, latent_layers(pupil.model)
    loras: dict[str, Any] = {}
    if options.adapter == "lora":
        loras = {preset: {name: layer.loras[preset] for name, layer in layers.items()} for preset in pupil.plans}
    if options.adapter == "nested" and len(pupil.plans) > 1:
        return [one(freeze(copy.deepcopy(model), preset), out / preset) for preset in pupil.plans]
    frozen = freeze(model)
    plug(frozen, {name: {preset: loras[preset][name] for preset in loras} for name in layers} if loras else {})
    return [one(frozen, out), *(str(out / ADAPTERS / preset) for preset in loras)]


def saved_before(frozen: nn.Module, path: Path) -> bool:
    """Whether a killed run has saved just this there, before it came to the next preset."""
    try:
        verify(path, frozen)
    except PolybitError:
        return False
    return True
