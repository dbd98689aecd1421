"""Search widths inside layers, for a plan that spends each layer's bits on the columns that need them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor

from polybit.acts.columns_search import ColumnSearch, search_layers
from polybit.acts.float_source import FloatSource, is_own_text, open_fitting, writer
from polybit.allocate.columns import Split, base_width, block_lengths, ranked_offsets
from polybit.compress import text
from polybit.compress.loop import Codes, compress
from polybit.compress.mix_files import gather_either, read_mix
from polybit.compress.plan_files import check_document, check_plan, counts_zero_points, read_plan, write_plan
from polybit.compress.recipe import choose
from polybit.compress.sorting import saved_after, sort_model
from polybit.core.plan import LEAST_GROUP, ColumnWidths, Plan, largest_width
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.hub.directory import check_output
from polybit.hub.models import is_embedded
from polybit.measure.mixture_truth import Harms
from polybit.nn.convert import Target, targets
from polybit.options.checks import plain
from polybit.options.columns import ColumnsOptions
from polybit.quant.table import QUANTIZERS


def columns(model: str, options: ColumnsOptions) -> Run:
    """Search widths for blocks of columns inside the layers of MODEL and write them as a plan for `quantize`."""
    if options.group_size < LEAST_GROUP:
        raise PolybitError(
            f"--group-size {options.group_size} is too small for widths inside layers: give {LEAST_GROUP} or more"
        )
    if options.sort is not None:
        check_output(options.sort)
    run = Run("columns", {"model": model, **plain(options)})
    with ExitStack() as kept:
        with run.timed():
            plan, run.numbers = searched(model, options, kept)
        write_plan(options.out, plan, remarks_of(options))
    return run


def searched(name: str, options: ColumnsOptions, kept: ExitStack) -> tuple[Plan, dict[str, Any]]:
    """Load, calibrate, sort when asked, search layer by layer, check on held-out text: (plan, numbers).

    kept: takes the sorted model, which appears when it is left: not before the plan for it is written.
    """
    source = open_fitting(name, options, whole_for="--sort" if options.sort is not None else None)
    model = source.model
    embedded = is_embedded(name)
    with writer(name, source, options, writes=writes_text(options, embedded=embedded)) as author:
        gathered = gather_either(
            author,
            source.tokenizer,
            options.calibration,
            options.mix,
            samples=options.samples,
            length=text.window_length(model, options.window),
            seed=options.seed,
            embedded=embedded,
        )
    batches = text.batches(gathered.windows_NT, text.BATCH)
    every = targets(model)
    base, means = starting_plan(options, every)
    chosen = [target for target in every if target.name in means]
    model.requires_grad_(False)
    if options.sort is not None:
        sort_model(model, chosen, batches)
        kept.enter_context(saved_after(model, source.tokenizer, options.sort))
    asked = ColumnSearch(options.block, options.group_size, options.search, options.method, zero_points(options))
    splits = search_layers(model, chosen, batches, means, asked, **source.where)
    plan = replace(base, columns=column_widths(splits, options.block))
    checked = check_plans(source, chosen, base, plan, gathered, options)
    layers = {
        key: {"offsets": list(s.offsets), "harm": s.harm, "tried": [list(t) for t in s.tried]}
        for key, s in splits.items()
    }
    return (plan if checked["kept"] else base), {"layers": layers, **checked}


def remarks_of(options: ColumnsOptions) -> dict[str, Any]:
    """What `quantize` must know beside the plan: groups and zero points as it was searched with."""
    return {"zero": "group" if zero_points(options) else "centre", "group_size": options.group_size}


def zero_points(options: ColumnsOptions) -> bool:
    """Whether every group has a zero point: as the plan that is given counts, else as the method does."""
    counted = None if options.plan is None else counts_zero_points(options.plan)
    return QUANTIZERS[options.method].zero == "group" if counted is None else counted


def starting_plan(options: ColumnsOptions, every: Sequence[Target]) -> tuple[Plan, dict[str, float]]:
    """The plan without columns, and the mean bits of every layer it quantizes."""
    if options.plan is None:
        assert options.bits is not None
        return Plan.uniform(f"w{base_width(options.bits)}"), {target.name: options.bits for target in every}
    plan = read_plan(options.plan)
    check_document(options.plan, every, options.group_size)
    chosen = check_plan(plan, every, options.group_size)
    return replace(plan, columns={}), {t.name: plan.bits_of(t.name, t.columns) for t in chosen}


def column_widths(splits: Mapping[str, Split], block: int) -> dict[str, ColumnWidths]:
    """The `columns` of a plan; layers whose blocks all have the layer's width need no entry."""
    return {name: ColumnWidths(block, split.offsets) for name, split in splits.items() if any(split.offsets)}


def check_plans(
    source: FloatSource,
    chosen: Sequence[Target],
    base: Plan,
    plan: Plan,
    gathered: text.Calibration,
    options: ColumnsOptions,
) -> dict[str, Any]:
    """KL on held-out windows with the searched columns and without, at equal bits; worse columns are not kept.

    Where the mean is a fraction there is no plan without columns at these bits: the same counts of blocks, taken from
    left to right, take its place, and the searched plan is kept in any case.
    """
    without, fraction = base, options.bits is not None and bool(options.bits % 1)
    if options.bits is not None and fraction:
        without = replace(base, columns=counted_widths(chosen, options.bits, options.block))
    harms = Harms(source.model, chosen, {"held out": gathered.held_out_MT}, **source.where)
    sizes = {target.name: target.size for target in chosen}
    found: dict[str, dict[str, float]] = {}
    for key, tried in (("without", without), ("with", plan)):
        counted = Counted(quantized_by(source, chosen, gathered.windows_NT, tried, options), sizes)
        measured = harms(counted)["held out"]
        found[key] = {"kl": measured.kl, "nll": measured.nll, "bits_per_weight": counted.bits / sum(sizes.values())}
    better = found["with"]["kl"] < found["without"]["kl"]
    return {**found, "better": better, "kept": bool(plan.columns) and (better or fraction)}


def counted_widths(chosen: Sequence[Target], mean: float, block: int) -> dict[str, ColumnWidths]:
    """Widths that reach a fractional mean by counts of blocks alone, the first blocks one bit up."""
    counted = {}
    for target in chosen:
        lengths = block_lengths(target.columns, block)
        offsets = ranked_offsets([-k for k in range(len(lengths))], lengths, mean, 0)
        if offsets is not None and any(offsets):
            counted[target.name] = ColumnWidths(block, offsets)
    return counted


class Counted:
    """Codes on their way, and the bits of those that went by."""

    def __init__(self, parts: Iterable[Codes], sizes: Mapping[str, int]) -> None:
        self.parts, self.sizes, self.bits = parts, sizes, 0.0

    def __iter__(self) -> Iterator[Codes]:
        for codes in self.parts:
            self.bits += sum(q.bits_per_weight() * self.sizes[name] for name, q in codes.items())
            yield codes


def quantized_by(
    source: FloatSource, chosen: Sequence[Target], windows_NT: Tensor, plan: Plan, options: ColumnsOptions
) -> Iterable[Codes]:
    """The codes of a plan, block after block."""
    recipe = choose(
        options.method,
        (largest_width(plan),),
        options.group_size,
        asymmetric=zero_points(options),
        effort="fast",
        seed=options.seed,
        plan=plan,
    )
    return compress(source.model, chosen, text.batches(windows_NT, text.BATCH), recipe, **source.where)


def writes_text(options: ColumnsOptions, *, embedded: bool) -> bool:
    """Whether the model has to write its own calibration text."""
    if options.mix is not None:
        return text.SELF in read_mix(options.mix)
    return is_own_text(options.calibration, embedded=embedded)
