"""`polybit columns`: widths inside layers, for a plan that spends each layer's bits on the columns that need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.compress.plan_files import LEAST_GROUP
from polybit.core.runtime import PolybitError
from polybit.hub.models import EMBEDDED, resolve

SEARCH_ROWS = 256  # output rows that stand for the whole layer while offsets are searched
WORTH = 0.97  # an exchange of blocks must lower the layer's loss to this share of it


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Flags of `polybit columns`."""

    out: Path
    """JSON file of the new plan."""
    bits: float | None = None
    """Mean bits of every layer; a fraction such as 3.5 is reached by counts of blocks."""
    plan: Path | None = None
    """A plan with a width per layer, whose means are kept (instead of --bits)."""
    block: int = 128
    """Columns that share a width; smaller for small models, as in 32."""
    group_size: int = 64
    """Weights that share a scale; must divide the block, and be given to polybit quantize too."""
    search: Literal["ranked", "spend"] = "ranked"
    """ranked = exchange the most and the least salient blocks; spend = measured losses, spent exactly."""
    sort: Path | None = None
    """Write the model to this directory with the hidden units of its feed-forwards sorted by salience, so that blocks
    differ; the plan is then for that model, which computes the same."""
    calibration: str = "auto"
    """Text to calibrate on, as for polybit quantize."""
    mix: str | None = None
    """Mixture of texts to calibrate on, FILE=SHARE,FILE=SHARE, or the .json of polybit mix."""
    samples: int = 64
    """Windows of calibration text."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    seed: int = 0
    """Seed of what is drawn."""
    json: Path | None = None
    """Write the run with all that was tried there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def columns(model: str, /, *, config: Annotated[ColumnsConfig, Parameter(name="*")]) -> None:
    """Search widths for blocks of columns inside the layers of MODEL and write them as a plan.

    `polybit quantize MODEL --plan PLAN` makes the checkpoint.
    """
    if (config.bits is None) == (config.plan is None):
        raise PolybitError("give either --bits, the mean of every layer, or --plan, a width per layer")
    if config.bits is not None and not 2 <= config.bits <= 8:
        raise PolybitError(f"--bits {config.bits:g} is not possible: give a mean from 2 to 8, as in 3.5")
    if config.block < 1 or not config.group_size or config.block % config.group_size:
        raise PolybitError(
            f"--block {config.block} is no multiple of --group-size {config.group_size}: "
            "give for example --block 64 --group-size 32"
        )
    if config.group_size < LEAST_GROUP:
        raise PolybitError(
            f"--group-size {config.group_size} is too small for widths inside layers: give {LEAST_GROUP} or more"
        )
    from polybit.compress.plan_files import write_plan
    from polybit.core.records import Run

    run = Run(
        "columns", {"model": model, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}}
    )
    with run.timed():
        plan, run.numbers = build(model, config)
    write_plan(config.out, plan)
    if config.json is not None:
        run.write(config.json)
    print_result(model, config, run.numbers)


def build(name: str, config: ColumnsConfig) -> tuple[Any, dict[str, Any]]:
    """Load, calibrate, sort when asked, search layer by layer, check on held-out text: (Plan, numbers)."""
    from polybit.compress import text
    from polybit.compress.mix_files import gather_either
    from polybit.hub.load import load_float
    from polybit.nn.convert import targets

    model, tokenizer = load_float(resolve(name), trust_remote_code=config.trust_remote_code)
    embedded = Path(resolve(name)) == Path(resolve(EMBEDDED))
    length = text.window_length(model, config.window)
    gathered = gather_either(
        model,
        tokenizer,
        config.calibration,
        config.mix,
        samples=config.samples,
        length=length,
        seed=config.seed,
        embedded=embedded,
    )
    batches = text.batches(gathered.windows_NT, text.BATCH)
    every = targets(model)
    base, means = starting_plan(config, every)
    chosen = [target for target in every if target.name in means]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.sort is not None:
        sort_model(model, tokenizer, chosen, batches, config.sort)
    splits = search_layers(model, chosen, batches, means, config)
    plan = replace(base, columns=column_widths(splits, config.block))
    checked = check_plans(model, chosen, base, plan, gathered, config)
    numbers = {
        "layers": {
            key: {"offsets": list(s.offsets), "harm": s.harm, "tried": [list(t) for t in s.tried]}
            for key, s in splits.items()
        },
        **checked,
    }
    if checked["kept"]:
        return plan, numbers
    return base, numbers


def starting_plan(config: ColumnsConfig, every: Sequence[Any]) -> tuple[Any, dict[str, float]]:
    """The plan without columns, and the mean bits of every layer it quantizes."""
    from polybit.allocate.columns import base_width
    from polybit.compress.plan_files import check_document, check_plan, read_plan
    from polybit.core.plan import Plan

    if config.plan is None:
        assert config.bits is not None
        return Plan.uniform(f"w{base_width(config.bits)}"), {target.name: config.bits for target in every}
    plan = read_plan(config.plan)
    check_document(config.plan, every, config.group_size)
    chosen = check_plan(plan, every, config.group_size)
    return replace(plan, columns={}), {t.name: plan.bits_of(t.name, t.columns) for t in chosen}


def sort_model(model, tokenizer, chosen: Sequence[Any], batches: Sequence[Any], out: Path) -> None:
    """Sort hidden units by salience, most salient first, make sure that the function stayed, and save the model."""
    import torch

    from polybit.compress.stats import collect
    from polybit.hub.directory import check_output, staged_directory
    from polybit.nn.sorting import feed_forwards, sort_units
    from polybit.quant.salience import column_salience

    check_output(out, overwrite=False)
    found = feed_forwards(chosen)
    if not found:
        raise PolybitError("--sort finds no feed-forward it can sort in this model: leave --sort out")
    with torch.no_grad():
        before_BTV = model(batches[0]).logits
        stats = collect(model, batches, [layers.out for layers in found])
        for layers in found:
            salience_I = column_salience(layers.out.weight_OI(model), stats[layers.out.name])
            sort_units(model, layers, salience_I.argsort(descending=True, stable=True))
        after_BTV = model(batches[0]).logits
    gap = float((after_BTV - before_BTV).abs().max() / before_BTV.abs().max())
    if not gap < 1e-3:
        raise PolybitError(
            f"--sort changed the model's logits by {gap:.1e} of their size, so its feed-forwards are of another kind "
            "than their names say: leave --sort out"
        )
    with staged_directory(out, overwrite=False) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)


def search_layers(
    model, chosen: Sequence[Any], batches: Sequence[Any], means: Mapping[str, float], config: ColumnsConfig
) -> dict[str, Any]:
    """Offsets of every layer, a decoder block at a time, on the float model's inputs."""
    from polybit.compress.blocks import find_blocks, outside, run_blocks
    from polybit.core.runtime import track

    rest = {target.name for target in outside(model, chosen)}
    _, modules = find_blocks(model, chosen)
    splits = {}
    for block in track(run_blocks(model, batches, chosen, references=False), "columns", total=len(modules)):
        stats = block.stats()
        for target in block.targets:
            if target.name not in rest:
                weight_OI = target.weight_OI(model)
                splits[target.name] = search_layer(weight_OI, stats[target.name], means[target.name], config)
        block.finish()
    return splits


def search_layer(weight_OI, stats, mean: float, config: ColumnsConfig) -> Any:
    """Offsets of one layer: least loss of its output under classic GPTQ, on evenly spaced rows."""
    from polybit.allocate.columns import Split, base_width, block_lengths, search_ranked, spend
    from polybit.core.affine import Grid
    from polybit.core.plan import ColumnWidths
    from polybit.quant.gptq import gptq
    from polybit.quant.problem import layer_loss
    from polybit.quant.salience import block_losses, column_salience, over_blocks

    rows_RI = weight_OI[:: -(-len(weight_OI) // SEARCH_ROWS)]
    lengths = block_lengths(weight_OI.shape[1], config.block)
    base = base_width(mean)
    plain = Grid(base, config.group_size, "group")

    def quantized(widths: Sequence[int]):
        offsets = tuple(b - base for b in widths)
        widths_G = ColumnWidths(config.block, offsets).group_widths(base, weight_OI.shape[1], config.group_size)
        return gptq(rows_RI, stats, plain.with_widths(widths_G), descent_sweeps=0)

    def harm(offsets: tuple[int, ...]) -> float:
        return layer_loss(rows_RI, quantized([base + offset for offset in offsets]), stats)

    per_column = over_blocks(column_salience(rows_RI, stats), config.block) / over_blocks(
        weight_OI.new_ones(weight_OI.shape[1]), config.block
    )
    found = search_ranked(per_column, lengths, mean, harm)
    start = found.tried[0][1]  # i = 0: nothing exchanged
    if config.search == "spend":
        widths = [b for b in range(base - 1, base + 3) if 1 <= b <= 8]
        losses = block_losses(
            rows_RI,
            {b: quantized([b] * len(lengths)) for b in widths if b > 1 or len(lengths) > 1},
            stats,
            config.block,
        )
        offsets = tuple(b - base for b in spend(losses.tolist(), widths, lengths, mean))
        found = min(
            found, Split(offsets, harm(offsets), (*found.tried, ("spend", harm(offsets)))), key=lambda s: s.harm
        )
    if found.harm <= WORTH * start:
        return found
    from polybit.allocate.columns import ranked_offsets

    unchanged = ranked_offsets(per_column.tolist(), lengths, mean, 0)
    assert unchanged is not None
    return replace(found, offsets=unchanged, harm=start)


def column_widths(splits: Mapping[str, Any], block: int) -> dict[str, Any]:
    """The `columns` of a plan; layers whose blocks all have the layer's width need no entry."""
    from polybit.core.plan import ColumnWidths

    return {name: ColumnWidths(block, split.offsets) for name, split in splits.items() if any(split.offsets)}


def check_plans(model, chosen: Sequence[Any], base, plan, gathered, config: ColumnsConfig) -> dict[str, Any]:
    """KL on held-out windows with the searched columns and without, at equal bits; worse columns are not kept.

    Where the mean is a fraction there is no plan without columns at these bits: the same counts of blocks, taken from
    left to right, take its place, and the searched plan is kept in any case.
    """
    from polybit.allocate.columns import block_lengths, ranked_offsets
    from polybit.compress.blocks import Whole
    from polybit.core.plan import ColumnWidths
    from polybit.measure.mixture_truth import harm

    plain = base
    if config.bits is not None and config.bits % 1:
        counted = {}
        for target in chosen:
            lengths = block_lengths(target.columns, config.block)
            offsets = ranked_offsets([-k for k in range(len(lengths))], lengths, config.bits, 0)
            if offsets is not None and any(offsets):
                counted[target.name] = ColumnWidths(config.block, offsets)
        plain = replace(base, columns=counted)
    whole = Whole(model, tuple(chosen))
    found = {}
    for key, tried in (("without", plain), ("with", plan)):
        weights, bits = quantize_by(model, chosen, gathered, tried, config)
        measured = harm(whole, weights, gathered.held_out_MT)
        found[key] = {"kl": measured.kl, "nll": measured.nll, "bits_per_weight": bits}
    fraction = config.bits is not None and bool(config.bits % 1)
    better = found["with"]["kl"] < found["without"]["kl"]
    return {**found, "better": better, "kept": bool(plan.columns) and (better or fraction)}


def quantize_by(model, chosen: Sequence[Any], gathered, plan, config: ColumnsConfig) -> tuple[dict[str, Any], float]:
    """Dequantized weights of a plan by GPTQ, block after block, and effective bits per weight."""
    from polybit.compress.loop import Nowhere, Recipe, compress
    from polybit.compress.recipe import largest_width
    from polybit.compress.text import BATCH, batches
    from polybit.core.affine import Grid

    bits = largest_width(plan)
    recipe = Recipe("gptq", Grid(bits, config.group_size, "group"), (bits,), seed=config.seed, plan=plan)
    parts = compress(model, chosen, batches(gathered.windows_NT, BATCH), recipe, Nowhere())
    codes = {name: q for part in parts for name, q in part.items()}
    sizes = {target.name: target.size for target in chosen}
    total = sum(q.bits_per_weight() * sizes[name] for name, q in codes.items())
    return {name: q.dequantize() for name, q in codes.items()}, total / sum(sizes.values())


def print_result(name: str, config: ColumnsConfig, numbers: Mapping[str, Any]) -> None:
    """What was found, whether it pays, and what to type next."""
    moved = sum(any(row["offsets"]) for row in numbers["layers"].values())
    without, with_ = numbers["without"], numbers["with"]
    print(f"{moved} of {len(numbers['layers'])} layers have blocks of {config.block} columns worth other widths.")
    print(
        f"KL on held-out windows: {with_['kl']:.4f} with them at {with_['bits_per_weight']:.3f} bits per weight, "
        f"{without['kl']:.4f} without at {without['bits_per_weight']:.3f}."
    )
    if not numbers["kept"]:
        print(f"They do not pay: {config.out} is the plan without widths inside layers.")
    model = config.sort or name
    print(f"Next: polybit quantize {model} --plan {config.out} --group-size {config.group_size} --out OUT")
