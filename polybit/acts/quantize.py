"""Turn a model into one checkpoint that runs at every width it was made for."""

from __future__ import annotations

import resource
from dataclasses import asdict
from typing import Any

from torch import nn

from polybit.acts.float_source import FloatSource, float_bytes, is_own_text, open_float, writer
from polybit.compress.ends import end_bits, end_targets, hold_ends, quantize_ends
from polybit.compress.loop import ExpertTokens, LayerJob, compress_in_place, quantize_layer
from polybit.compress.mix_files import gather_either, read_mix
from polybit.compress.plan_files import check_document, check_plan, counts_zero_points, read_plan, store_plan
from polybit.compress.recipe import Recipe, choose, within_memory
from polybit.compress.sizes import described, preset_sizes
from polybit.compress.text import (
    AUTO,
    BATCH,
    HELD_OUT,
    SELF,
    Calibration,
    auto_source,
    batches,
    window_length,
)
from polybit.core.affine import QWeight
from polybit.core.memory import fits
from polybit.core.precision import FLOAT
from polybit.core.records import RUN_FILE, Run
from polybit.core.runtime import PolybitError, atomic_path, json_text, warn
from polybit.evals.compare import EvalMaterial, compare
from polybit.hub.checkpoint import save
from polybit.hub.directory import check_output, output_lock
from polybit.hub.lm import LocalLM
from polybit.hub.load import load_float, load_quantized
from polybit.hub.models import device_of, is_embedded, own_name, resolve
from polybit.hub.workers import ALONE, Team, Where
from polybit.hub.workspace import Workspace
from polybit.nn.convert import Target, left_in_float, targets
from polybit.nn.rotation import Rotation, rotate, rotation_of
from polybit.options.checks import plain
from polybit.options.quantize import QuantizeOptions
from polybit.options.words import command_line
from polybit.report.card import model_card

FEW_SHARE = 0.1  # of an even share of the tokens, below which an expert got few


def quantize(model: str, options: QuantizeOptions) -> Run:
    """Quantize MODEL (a local path, a hub id, or tinychat) into one checkpoint at `out`.

    Interrupted runs go on where they stopped when the same is asked again.
    """
    recipe = recipe_for(options)  # what cannot be meant is refused before anything is loaded
    run = Run("quantize", {"model": model, **plain(options), "method": recipe.method})
    check_output(options.out, overwrite=options.overwrite)
    with output_lock(options.out), run.timed():
        run.numbers = build(model, options, recipe, run)
    return run


def recipe_for(options: QuantizeOptions) -> Recipe:
    """The recipe that is meant, its plan read; unless told otherwise with the zero points the plan's bits count."""
    plan, asymmetric = None, options.asymmetric
    if options.plan is not None:
        plan = read_plan(options.plan)
        asymmetric = counts_zero_points(options.plan) if asymmetric is None else asymmetric
    if options.rotate and plan is not None and plan.columns:
        raise PolybitError(
            f"{options.plan} gives columns inside layers widths of their own, and --rotate mixes the columns: "
            "give a plan with one width per layer, or leave --rotate out"
        )
    return choose(
        options.chosen_method(),
        options.stored_widths(),
        options.group_size,
        asymmetric=asymmetric,
        effort=options.effort,
        seed=options.seed,
        plan=plan,
    )


def build(name: str, options: QuantizeOptions, recipe: Recipe, run: Run) -> dict[str, Any]:
    """Load, calibrate, quantize block by block, save, measure; returns the numbers of the run."""
    source = open_float(name, options, whole=options.rotate)
    untied = options.rotate and rotate(source.model, Rotation(options.seed))
    chosen, recipe = chosen_targets(name, source.model, options, recipe)
    if recipe.finish_steps and source.lent is not None:  # gradient steps over all weights at once
        source = open_float(name, options, whole=True)
    model = source.model
    bits_of_ends = FLOAT if options.include_embeddings else end_bits(model, options.ends)
    ends = end_targets(model) if bits_of_ends != FLOAT else []
    leftovers = [asdict(row) for row in left_in_float(model, [*chosen, *ends])]
    size = float_bytes(model)
    text = calibration(name, source, options, recipe)
    fingerprint = {"model": source.digest(), "calibration": text.digest(), **recipe.to_json()}
    fingerprint |= {"include_embeddings": options.include_embeddings, "ends": bits_of_ends}
    store = Workspace(options.out, fingerprint, restart=options.restart)
    try:
        experts: ExpertTokens = {}
        errors = filled(source, chosen, text, recipe, store, bits_of_ends, experts, Where(options.workers, options.ray))
        if source.lent is None:
            model.to("cpu")  # from where it is written
        pieces = source.pieces(store)
        numbers: dict[str, Any] = {
            "widths": list(recipe.widths),
            **described(model, recipe.presets, errors=errors, left_in_float=leftovers),
            **rotation_numbers(model, untied),
            **expert_numbers(experts),
            "streamed": source.lent is not None,
        }
        notes = {"base_model": own_name(name), "recipe": recipe.to_json(), "text": text.source}
        more: dict[str, Any] = {"widths": recipe.widths, "notes": notes, "overwrite": options.overwrite}
        card = card_files(name, run, numbers, options)
        more |= {"pieces": pieces, "files": card, "verified": True}
        saved = save(model, options.out, tokenizer=source.tokenizer, **more)
        store.discard()
    finally:
        store.close()
    if options.measure and may_measure(name, source, size, options):
        quantized = model if source.lent is None else load_quantized(saved)[0]
        numbers["measured"] = measured(name, quantized, source.tokenizer, text, recipe, options)
    for file, content in card_files(name, run, numbers, options).items():
        with atomic_path(saved / file) as staged:
            staged.write_text(content, encoding="utf-8")
    return numbers


def filled(
    source: FloatSource,
    chosen: list[Target],
    text: Calibration,
    recipe: Recipe,
    store: Workspace,
    bits_of_ends: int,
    experts: ExpertTokens,
    where: Where = ALONE,
) -> dict[str, dict[str, float]]:
    """Put codes in the place of weights, in the blocks and at the ends; the relative errors of the blocks."""
    model, windows = source.model, batches(text.windows_NT, BATCH)
    with Team(LayerQuantizer, (), where) as team:
        errors = compress_in_place(
            model,
            chosen,
            windows,
            recipe,
            store,
            source=source.weights,
            room=source.room(store.path),
            experts=experts,
            quantize=None if where.alone else lambda jobs: team.in_order([(job[0].clone(), *job[1:]) for job in jobs]),
        )
    keep = None if source.lent is None else store.write_planes
    names = quantize_ends(model, bits_of_ends, recipe.grid.group_size, source=source.weights, keep=keep)
    if recipe.plan is not None:
        store_plan(model, recipe.plan, nested=recipe.is_nested)  # after every layer is in its place
    plain = tuple(width for width in recipe.widths if f"w{width}" in recipe.presets)  # none in a file made by a plan
    hold_ends(model, names, bits_of_ends, plain)
    return errors


class LayerQuantizer:
    """A worker that makes codes of a layer from its weight and statistics."""

    def __call__(self, job: LayerJob) -> QWeight:
        """On the CPU, as in one process."""
        return quantize_layer(*job)


def may_measure(name: str, source: FloatSource, size: int, options: QuantizeOptions) -> bool:
    """Whether there is memory to compare with the float model; says so where there is none."""
    if source.lent is None or fits(2 * size, options.memory):
        return True
    warn(
        f"{name} is not measured: beside its checkpoint it would take up to {2 * size / 1e9:.1f} GB of memory; "
        "give more --memory, or --no-measure to leave it out in silence"
    )
    return False


def chosen_targets(
    name: str, model: nn.Module, options: QuantizeOptions, recipe: Recipe
) -> tuple[list[Target], Recipe]:
    """The weights that become codes, and the recipe as far as these weights and this machine's memory allow it."""
    chosen = targets(model, include_embeddings=options.include_embeddings)
    if not chosen:
        raise PolybitError(f"{name} has no weight that can be quantized: only embeddings, norms or unknown layers")
    if recipe.plan is not None and options.plan is not None:
        check_document(options.plan, chosen, options.group_size)
        chosen = check_plan(recipe.plan, chosen, options.group_size)
        recipe = recipe.narrowed(chosen)
    return chosen, within_memory(recipe, sum(target.size for target in chosen))


def calibration(name: str, source: FloatSource, options: QuantizeOptions, recipe: Recipe) -> Calibration:
    """The text to calibrate and to measure on; none where nobody asked for a text and nothing reads it."""
    length = window_length(source.model, options.window)
    asked = options.mix is not None or options.calibration != AUTO
    if not (asked or options.measure or recipe.reads_text):
        return Calibration.empty(auto_source(embedded=is_embedded(name)), length)
    writes = writes_its_text(name, options)
    spares = writes and options.mix is None  # what nobody reads need not be written; of a file it costs nothing
    with writer(name, source, options, writes=writes) as model:
        return gather_either(
            model,
            source.tokenizer,
            options.calibration,
            options.mix,
            samples=0 if spares and not recipe.reads_text else options.samples,
            held_out=0 if spares and not options.measure else HELD_OUT,
            length=length,
            seed=options.seed,
            embedded=is_embedded(name),
        )


def writes_its_text(name: str, options: QuantizeOptions) -> bool:
    """Whether the model has to write its own calibration text."""
    if options.mix is not None:
        return SELF in read_mix(options.mix)
    return is_own_text(options.calibration, embedded=is_embedded(name))


def expert_numbers(experts: ExpertTokens) -> dict[str, Any]:
    """How many tokens of calibration went to each expert, and which got few; {} where there are no experts.

    An expert has no statistics of its own: all of a layer are rounded by what any of them saw, so that one that saw
    few tokens, or none, falls back on the others'.
    """
    if not experts:
        return {}
    few: dict[str, list[int]] = {}
    for name, tokens in experts.items():
        least = FEW_SHARE * sum(tokens) / len(tokens)
        few |= {name: scarce} if (scarce := [e for e, seen in enumerate(tokens) if seen < least]) else {}
    return {"experts": {"tokens": experts, "few": few}}


def rotation_numbers(model: Any, untied: bool) -> dict[str, Any]:
    """How the model was rotated, and the bytes of a head that is no longer the embedding; {} where it was not."""
    rotation = rotation_of(model)
    if rotation is None:
        return {}
    head = model.get_output_embeddings().state_dict().values() if untied else ()
    return {"rotation": {**rotation.to_json(), "untied_head_bytes": sum(t.numel() * t.element_size() for t in head)}}


def measured(
    name: str, quantized: nn.Module, tokenizer: Any, text: Calibration, recipe: Recipe, options: QuantizeOptions
) -> dict[str, Any]:
    """Compare the new checkpoint with a fresh copy of the float model on windows calibration never saw."""
    device = device_of(options.device)
    reference, _ = load_float(resolve(name), trust_remote_code=options.trust_remote_code)
    return compare(
        LocalLM(reference.to(device), tokenizer),
        LocalLM(quantized.to(device), tokenizer),
        recipe.presets,
        EvalMaterial(text.held_out_MT),
        sizes=preset_sizes(quantized, recipe.presets),
        seed=options.seed,
    )


def card_files(name: str, run: Run, numbers: dict[str, Any], options: QuantizeOptions) -> dict[str, str]:
    """The model card, and the run beside it; both may change without making the checkpoint another one."""
    numbers["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    command = command_line("quantize", name, options, leave_out=("overwrite", "restart", "workers", "ray"))
    record = {**run.to_json(), "numbers": numbers, "command": command}
    return {"README.md": model_card(name, record), RUN_FILE: json_text(record)}
