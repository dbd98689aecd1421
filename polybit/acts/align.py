"""Teach a quantized model to answer as its float self, and save a checkpoint of the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polybit.acts.launch import by_processes
from polybit.acts.pairs import model_pair
from polybit.compress.ends import HeldEnds, held_ends
from polybit.compress.sizes import named_plans, plain_widths, quantized_layers, stored_bits_per_weight
from polybit.compress.stats import collect
from polybit.core.affine import QWeight
from polybit.core.plan import Plan
from polybit.core.planes import unpack
from polybit.core.records import LayerStats, Run
from polybit.core.runtime import PolybitError, warn
from polybit.hub.checkpoint import save
from polybit.hub.directory import check_output
from polybit.hub.load import load_float, load_quantized
from polybit.hub.models import device_of, own_name
from polybit.hub.workers import Where
from polybit.hub.workspace import model_digest
from polybit.nn.convert import targets
from polybit.nn.linear import QuantLinear
from polybit.nn.rotation import rotate
from polybit.options.align import AlignOptions
from polybit.options.checks import plain
from polybit.options.pairs import SHARD
from polybit.train import world
from polybit.train.align import Refresh
from polybit.train.align import run as train
from polybit.train.answering import AskedModels, Asking, Hands, are_made, make_pairs
from polybit.train.balance import Balance
from polybit.train.fit import Course, Outcome
from polybit.train.latent import freeze
from polybit.train.material import AnswersRead, PairMaterial, largest_token, read_material
from polybit.train.pairs import SUMMARY, summary
from polybit.train.schedules import every, in_turn
from polybit.train.table import AnswerKnobs
from polybit.train.widths import FileWidths, settle_kept, trainable_of, widths_of

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 128
WINDOWS, LENGTH = 64, 128  # of prompts and answers, for settling the widths that are kept
FREE = (
    "out",
    "overwrite",
    "restart",
    "workers",
    "ray",
    "processes",
    "device",
    "trust_remote_code",
)  # options that change no result


def align(model: str, options: AlignOptions) -> Run:
    """Train MODEL (a float model or a polybit checkpoint) to answer as its float self and save it at `options.out`.

    The moment of the run with the fewest held-out flips and the smallest KL is kept, the start if nothing beats it.
    """
    return by_processes("polybit.acts.align:align", model, options, aligned)


def aligned(model: str, options: AlignOptions) -> Run:
    """`align` in one of its processes."""
    run = Run("align", {"model": model, **plain(options)})
    with run.timed():
        check_output(options.out, overwrite=options.overwrite)
        objective = objective_of(options)
        models = model_pair(
            model,
            precision=options.narrowest,
            reference=options.reference,
            group_size=options.group_size,
            trust_remote_code=options.trust_remote_code,
        )
        with world.held(options.out):
            pairs = options.pairs or asked_first(models, options)
            run.numbers = align_with(model, models, pairs, objective, options)
    return run


def objective_of(options: AlignOptions) -> AnswersRead:
    """The objective of the method, with its knobs."""
    knobs = AnswerKnobs(
        beta=options.beta,
        loss=options.loss,
        nll=options.nll,
        anchor=options.anchor,
        gamma=options.gamma,
        shared_prefix=options.shared_prefix,
        steps=options.steps,
    )
    return options.objective.build(knobs)


def asked_first(models: AskedModels, options: AlignOptions) -> Path:
    """Pairs of --prompts, beside the output, kept until the checkpoint is complete and taken over by a later run."""
    assert options.prompts is not None
    directory = options.out.with_name(f"{options.out.name}.pairs")
    compared = options.objective.pairs and not options.refresh
    asking = Asking(prompts=options.prompts, max_tokens=options.max_tokens, shard=SHARD, float_only=not compared)
    if world.first() and not are_made(directory, models, asking):
        old = (directory / SUMMARY).is_file()
        hands = Hands(where=Where(options.workers, options.ray), device=options.device)
        make_pairs(models, asking, directory, hands=hands, overwrite=old, restart=options.restart)
    world.wait()
    return directory


def check_tokens(model: Any, pairs: Path, material: PairMaterial) -> None:
    """Refuse pairs with tokens that the model does not have."""
    rows, largest = model.get_input_embeddings().num_embeddings, largest_token(material)
    if largest >= rows:
        raise PolybitError(
            f"{pairs} holds the token {largest}, and the model's embedding has {rows} rows: "
            "make the pairs with this model"
        )


def align_with(
    name: str, models: AskedModels, pairs: Path, objective: AnswersRead, options: AlignOptions
) -> dict[str, Any]:
    """Training, freezing, saving; returns the numbers of the run."""
    model, tokenizer = load_float(models.float_name, trust_remote_code=options.trust_remote_code)
    noted = summary(pairs)
    widths = chosen_widths(models, str(noted["precision"]), options)
    digest = model_digest(model)
    if models.rotation is not None:
        rotate(model, models.rotation)  # it says the same, in the basis of the codes
    told = fingerprint(options, models, digest, widths)
    store = world.workspace(options.out, told, restart=options.restart)
    try:
        parent = None if models.checkpoint is None else start_of(models.checkpoint, model, options.trust_remote_code)
        if parent is not None:
            parent.ends.into_float(model)
        material = read_material(pairs, reference=digest, pad_token=tokenizer.pad_token_id or 0)
        check_tokens(model, pairs, material)
        count = options.held_out or max(1, min(HELD_OUT_MOST, int(len(material) * HELD_OUT_SHARE)))
        halves = material.split(count)
        stats = statistics(model, halves[0]) if widths.settled else {}
        trainable = trainable_of(
            model,
            widths,
            None if parent is None else parent.codes,
            group_size=options.group_size,
            adapter=options.adapter,
            rank=options.rank,
            scales=options.scales,
        ).to(device_of(options.device))
        outcome = train(
            trainable,
            halves,
            objective,
            widths.trained,
            out=store.path / "run",
            course=course_of(options, widths),
            schedule=in_turn if widths.chained else every,
            refresh=Refresh(tokenizer, options.refresh, int(noted["max_tokens"])),
        )
        settled = settle_kept(trainable, widths.kept, stats, halves[1], outcome)
        frozen = freeze(trainable.cpu(), widths.trained[0] if options.adapter == "nested" else None)
        base = own_name(name if models.checkpoint is None else models.float_name)
        notes = {"base_model": base, "aligned": noted_of(options, outcome)}
        if parent is not None:
            parent.ends.into_checkpoint(frozen, widths.plain, widths.named)
        if world.first():
            more: dict[str, Any] = {"widths": widths.stored, "notes": notes, "overwrite": options.overwrite}
            save(frozen, options.out, tokenizer=tokenizer, verified=True, **more)
        world.wait()
        store.discard()
    finally:
        store.close()
    return numbers_of(outcome, settled, halves) | {"stored_bits_per_weight": stored_bits_per_weight(frozen)}


def chosen_widths(models: AskedModels, pairs_at: str, options: AlignOptions) -> FileWidths:
    """The widths of the run, with a warning where the pairs are of others."""
    stored: tuple[int, ...] = ()
    plans: dict[str, Plan] = {}
    if models.checkpoint is not None:
        quantized = load_quantized(models.checkpoint)[0]
        stored, plans = plain_widths(quantized), without_ends(named_plans(quantized), quantized)
    how: dict[str, Any] = {"adapter": options.adapter, "latents": options.latents, "scales": options.scales}
    widths = widths_of(options.names, stored, plans, pairs_at, **how)
    if options.objective.pairs and options.refresh == 0 and widths.trained != (pairs_at,):
        warn(f"the pairs are of {pairs_at}, not of {', '.join(widths.trained)}: answers are only renewed with refresh")
    return widths


def without_ends(plans: Mapping[str, Plan], model: Any) -> dict[str, Plan]:
    """Plans of the blocks alone: the ends of a checkpoint are held apart."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    kept = {n: {key: p for key, p in plan.layers.items() if key not in names} for n, plan in plans.items()}
    return {name: replace(plan, layers=kept[name]) for name, plan in plans.items()}


def course_of(options: AlignOptions, widths: FileWidths) -> Course:
    """The course of the run."""
    return Course(
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        learning_rate=options.rate,
        probes=options.probes,
        seed=options.seed,
        balance=Balance(options.share),
        allowed=widths.allowed(options.keep_within),
        back=options.objective.back,
        exact=options.keep_within if len(widths.trained) > 1 else 0.0,
    )


def statistics(model: nn.Module, material: PairMaterial) -> dict[str, LayerStats]:
    """What calibration sees of the float model at every layer, from prompts and their answers."""
    answered = zip(material.prompts, material.chosen, strict=True)
    joined = torch.tensor([token for prompt, answer in answered for token in (*prompt, *answer.tokens)])
    joined = joined[: WINDOWS * LENGTH]
    length = min(LENGTH, len(joined))
    ids_NT = joined[: len(joined) // length * length].view(-1, length)
    kinds = [target for target in targets(model) if target.kind != "embedding"]
    return collect(model, list(ids_NT.split(8)), kinds)


@dataclass(frozen=True)
class Start:
    """What a checkpoint brings to its alignment: codes to train, and ends that stay as they are."""

    codes: Mapping[str, QWeight]
    ends: HeldEnds


def start_of(checkpoint: str, like: nn.Module, trust_remote_code: bool) -> Start:
    """The start a checkpoint gives; one that quantizes more than linear layers and its ends is refused.

    like: the float model
    """
    quantized, _ = load_quantized(checkpoint, trust_remote_code=trust_remote_code)
    ends = held_ends(quantized, like)
    layers = {name: module for name, module in quantized_layers(quantized).items() if name not in ends.planes}
    left = {name for name, module in layers.items() if not isinstance(module, QuantLinear)}
    if left:
        raise PolybitError(
            f"{checkpoint} quantizes {min(left)!r:.120}, which is no linear layer and cannot be trained: "
            "make the checkpoint without --include-embeddings, from a model without fused experts"
        )
    return Start({name: unpack(module.planes) for name, module in layers.items()}, ends)


def fingerprint(options: AlignOptions, models: AskedModels, digest: str, widths: FileWidths) -> dict[str, Any]:
    """All that decides the result of a run, so that a resumed one cannot mix two."""
    told = {key: value for key, value in plain(options).items() if key not in FREE}
    return {**told, "reference": digest, "checkpoint": models.checkpoint, "presets": list(widths.presets)}


def noted_of(options: AlignOptions, outcome: Outcome) -> dict[str, Any]:
    """What a checkpoint says about its alignment."""
    return {
        "method": options.method,
        "steps": options.steps,
        "learning_rate": options.rate,
        "refresh_every": options.refresh,
        "kept": outcome.kept,
    }


def numbers_of(
    outcome: Outcome, settled: Mapping[str, Any], halves: tuple[PairMaterial, PairMaterial]
) -> dict[str, Any]:
    """Numbers of the run: each width before and after, the choice, the history.

    settled: numbers of widths that were kept, after their own bits were chosen again.
    """
    assert outcome.picker is not None
    return {
        "prompts": {"train": len(halves[0]), "held_out": len(halves[1])},
        "presets": {
            name: {"before": dict(outcome.start[name]), "after": dict({**outcome.best, **settled}[name])}
            for name in outcome.start
        },
        "kept": outcome.kept,
        "stopped": outcome.picker.stopped,
        "history": outcome.picker.history,
        "log": outcome.log,
        "train_seconds": outcome.seconds,
    }
