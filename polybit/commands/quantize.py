"""`polybit quantize`: a model in, one checkpoint out that runs at every width it was made for."""

from __future__ import annotations

import resource
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.compress.plan_files import check_document, check_plan, read_plan
from polybit.core.precision import FLOAT, check_width, parse_widths
from polybit.core.runtime import PolybitError
from polybit.hub.models import EMBEDDED, resolve

Method = Literal["nested", "rounding", "gptq", "awq", "hqq", "rtn"]
DEFAULT_WIDTHS = "8,6,5,4,3,2"


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Flags of `polybit quantize`."""

    out: Path
    """Directory of the new checkpoint."""
    widths: str | None = None
    """Widths one nested checkpoint serves, with commas (default: 8,6,5,4,3,2 unless --bits is given)."""
    bits: int | None = None
    """One width only: the best fixed checkpoint of that width."""
    plan: Path | None = None
    """JSON file with a width per layer, and per block of columns, as polybit allocate writes it: one fixed file of
    these widths, or with --widths a nested file that is also read by the plan."""
    method: Method | None = None
    """How weights become codes (default: nested for --widths, rounding for --bits and --plan)."""
    group_size: int = 64
    """Weights that share a scale: 16, 32, 64, 128, 256, or 0 = a whole row."""
    asymmetric: bool | None = None
    """Store a zero point per group (default: nested, awq, hqq, rtn and gptq do, rounding does not)."""
    calibration: str = "auto"
    """Text to calibrate on: a .txt or .jsonl file, a named set, a dataset id, or self = text the model writes itself
    (auto: the embedded generator for tinychat, otherwise self)."""
    mix: str | None = None
    """Mixture of texts to calibrate on, FILE=SHARE,FILE=SHARE, or the .json of polybit mix (instead of
    --calibration)."""
    samples: int = 128
    """Windows of calibration text."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    effort: Literal["fast", "normal", "best"] = "normal"
    """fast = no learned rounding; best = also try to train nested files over the whole model, kept only if it helps."""
    rotate: bool = False
    """Turn the residual stream and the heads by Hadamard matrices folded into the weights (Llama, Mistral, Qwen2,
    Qwen3): the float model says the same, and large channels are spread over all, for narrow activations as in w4a4.
    A tied output head usually becomes a weight of its own."""
    include_embeddings: bool = False
    """Quantize the token embedding and the output head as all other layers, at every width."""
    ends: int | None = None
    """Bits of the token embedding and the output head whatever the width, 16 = float (default: 8 where the head has
    4 million weights or more, and would cost more time in float than it is worth; float for smaller ones)."""
    seed: int = 0
    """Seed of everything that is drawn."""
    measure: bool = True
    """Measure the new checkpoint on held-out windows for its model card."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""
    json: Path | None = None
    """Write the run with all its numbers there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def quantize(model: str, /, *, config: Annotated[QuantizeConfig, Parameter(name="*")]) -> None:
    """Quantize MODEL (a local path, a hub id, or tinychat) into one checkpoint at --out.

    Interrupted runs go on where they stopped when the same command is given again.
    """
    recipe = recipe_of(config)  # flags that cannot be meant are refused before anything is loaded
    from polybit.core.records import Run
    from polybit.hub.directory import check_output, output_lock

    run = Run(
        "quantize", {"model": model, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}}
    )
    run.config["method"] = recipe.method
    check_output(config.out, overwrite=config.overwrite)
    with output_lock(config.out), run.timed():
        numbers = build(model, config, run)
    run.numbers = numbers
    if config.json is not None:
        run.write(config.json)
    print_result(model, config, numbers)


def recipe_of(config: QuantizeConfig):
    """The Recipe the flags mean; flags that contradict each other are refused."""
    if config.widths is not None and config.bits is not None:
        raise PolybitError(
            "--widths and --bits exclude each other: give --widths for one nested file, --bits for one width"
        )
    if config.plan is not None and config.bits is not None:
        raise PolybitError("--plan and --bits exclude each other: the plan says the width of every layer")
    if config.mix is not None and config.calibration != "auto":
        raise PolybitError("--mix and --calibration exclude each other: name all texts in --mix")
    fixed = config.bits is not None or (config.plan is not None and config.widths is None)
    if fixed and config.method == "nested":
        raise PolybitError("--method nested makes one file for several widths: give --widths, or another --method")
    if not fixed and config.method not in (None, "nested"):
        raise PolybitError(
            f"--method {config.method} makes a checkpoint of one width: give --bits, or --method nested with --widths"
        )
    plan = None if config.plan is None else read_plan(config.plan)
    if config.rotate and plan is not None and plan.columns:
        raise PolybitError(
            f"{config.plan} gives columns inside layers widths of their own, and --rotate mixes the columns: "
            "give a plan with one width per layer, or leave --rotate out"
        )
    if plan is not None and fixed:
        from polybit.compress.recipe import largest_width

        widths: tuple[int, ...] = (largest_width(plan),)
    elif config.bits is not None:
        widths = (check_width("w", config.bits),)
    else:
        widths = parse_widths(config.widths or DEFAULT_WIDTHS)
    if max(widths) > 8:
        raise PolybitError("--bits 16 leaves the model as it is: choose 2 to 8")
    if not fixed and len(widths) < 2:
        raise PolybitError(
            f"--widths {config.widths} is a single width: use --bits {widths[0]} for the best file of that width"
        )
    from polybit.compress.recipe import choose

    method = config.method or ("rounding" if fixed else "nested")
    return choose(
        method,
        widths,
        config.group_size,
        asymmetric=config.asymmetric,
        effort=config.effort,
        seed=config.seed,
        plan=plan,
    )


def build(name: str, config: QuantizeConfig, run) -> dict[str, Any]:
    """Load, calibrate, quantize block by block, save, verify, measure; returns the numbers of the run."""
    from polybit.compress import text
    from polybit.compress.ends import end_bits, end_targets, hold_ends, quantize_ends
    from polybit.compress.mix_files import gather_either
    from polybit.compress.recipe import within_memory
    from polybit.hub.checkpoint import save, verify
    from polybit.hub.workspace import Workspace, model_digest
    from polybit.nn.convert import left_in_float, targets

    recipe = recipe_of(config)
    model, tokenizer, untied = load_source(name, config)
    chosen = targets(model, include_embeddings=config.include_embeddings)
    if not chosen:
        raise PolybitError(f"{name} has no weight that can be quantized: only embeddings, norms or unknown layers")
    if recipe.plan is not None and config.plan is not None:
        check_document(config.plan, chosen, config.group_size)
        chosen = check_plan(recipe.plan, chosen, config.group_size)
        recipe = narrowed(recipe, chosen)
    recipe = within_memory(recipe, sum(target.size for target in chosen))
    bits_of_ends = FLOAT if config.include_embeddings else end_bits(model, config.ends)
    ends = end_targets(model) if bits_of_ends != FLOAT else []
    leftovers = [asdict(row) for row in left_in_float(model, [*chosen, *ends])]
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
    fingerprint = {"model": model_digest(model), "calibration": gathered.digest(), **recipe.to_json()}
    fingerprint |= {"include_embeddings": config.include_embeddings, "ends": bits_of_ends}
    store = Workspace(config.out, fingerprint, restart=config.restart)
    try:
        errors = replace_weights(model, chosen, text.batches(gathered.windows_NT, text.BATCH), recipe, store)
        name_plan(model, recipe)
        hold_ends(model, quantize_ends(model, bits_of_ends, config.group_size), bits_of_ends, recipe.widths)
        notes = {"base_model": EMBEDDED if embedded else name, "recipe": recipe.to_json(), "text": gathered.source}
        saved = save(
            model, config.out, tokenizer=tokenizer, widths=recipe.widths, notes=notes, overwrite=config.overwrite
        )
        verify(saved, model)
        store.discard()
    finally:
        store.close()
    numbers = {**describe(model, recipe, errors, leftovers), **describe_rotation(model, untied)}
    numbers["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if config.measure:
        numbers["measured"] = measure(name, model, tokenizer, gathered, recipe, config)
    write_card(saved, name, run, numbers, config)
    return numbers


def load_source(name: str, config: QuantizeConfig) -> tuple[Any, Any, bool]:
    """(the float model as it will be quantized, its tokenizer, whether rotating it untied its head)."""
    from polybit.hub.load import load_float
    from polybit.nn.rotation import Rotation, rotate

    model, tokenizer = load_float(resolve(name), trust_remote_code=config.trust_remote_code)
    return model, tokenizer, config.rotate and rotate(model, Rotation(config.seed))


def describe_rotation(model, untied: bool) -> dict[str, Any]:
    """How the model was rotated, and the bytes of a head that is no longer the embedding; {} where it was not."""
    from polybit.nn.rotation import rotation_of

    rotation = rotation_of(model)
    if rotation is None:
        return {}
    head = model.get_output_embeddings().state_dict().values() if untied else ()
    return {"rotation": {**rotation.to_json(), "untied_head_bytes": sum(t.numel() * t.element_size() for t in head)}}


def replace_weights(model, chosen: Sequence[Any], windows: Sequence[Any], recipe, store) -> dict[str, dict[str, float]]:
    """Quantize `model` in place, letting float weights go block by block; returns the relative error of every layer."""
    from polybit.compress.loop import compress, relative_errors
    from polybit.core.planes import pack
    from polybit.nn.convert import convert

    by_name = {target.name: target for target in chosen}
    errors = {}
    for done in compress(model, chosen, windows, recipe, store):
        for key, q in done.items():
            errors[key] = relative_errors(by_name[key].weight_OI(model), q, recipe)
        convert(model, {key: pack(q) for key, q in done.items()})
    return errors


def narrowed(recipe, chosen: Sequence[Any]):
    """The recipe of a fixed plan with no more bits than its widest layer has; others as they are."""
    from polybit.compress.loop import is_nested

    if is_nested(recipe):
        return recipe
    bits = max(recipe.grid_of(target.name, target.columns).bits for target in chosen)
    return replace(recipe, widths=(bits,), grid=replace(recipe.grid, bits=bits))


def name_plan(model, recipe) -> None:
    """Store the plan as a preset: a nested file is read by it, a fixed one holds just what it says."""
    from polybit.compress.loop import PLAN, is_nested
    from polybit.compress.plan_files import fixed_preset
    from polybit.nn.switch import panel, set_presets

    if recipe.plan is None:
        return
    stored = {name: layer.bits for name, layer in panel(model).layers.items()}
    set_presets(model, {PLAN: recipe.plan if is_nested(recipe) else fixed_preset(recipe.plan, stored)})


def preset_names(recipe) -> list[str]:
    """What the new checkpoint can be read at."""
    from polybit.compress.loop import PLAN, is_nested

    widths = [f"w{b}" for b in recipe.widths]
    if recipe.plan is None:
        return widths
    return [*widths, PLAN] if is_nested(recipe) else [PLAN]


def describe(
    model, recipe, errors: Mapping[str, Mapping[str, float]], leftovers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Sizes at every width, per layer and together, and what stays in float."""
    from polybit.compress.sizes import bytes_read, preset_sizes, quantized_layers, stored_bits_per_weight
    from polybit.nn.switch import at

    presets = preset_names(recipe)
    layers: dict[str, Any] = {
        key: {"shape": [layer.rows, layer.columns], "bytes": {}, "relative_error": errors.get(key)}
        for key, layer in quantized_layers(model).items()
    }
    for preset in presets:
        with at(model, preset):
            for key, layer in quantized_layers(model).items():
                layers[key]["bytes"][preset] = bytes_read(layer.planes, layer.reading)
    return {
        "widths": list(recipe.widths),
        "presets": presets,
        "stored_bits_per_weight": stored_bits_per_weight(model),
        "sizes": preset_sizes(model, presets),
        "float_share": sum(row["share"] for row in leftovers),
        "left_in_float": list(leftovers),
        "layers": layers,
    }


def measure(name: str, quantized, tokenizer, gathered, recipe, config: QuantizeConfig) -> dict[str, Any]:
    """Compare the new checkpoint with a fresh copy of the float model on windows calibration never saw."""
    from polybit.compress.sizes import preset_sizes
    from polybit.evals.compare import EvalMaterial, compare
    from polybit.hub.lm import LocalLM
    from polybit.hub.load import load_float

    reference, _ = load_float(resolve(name), trust_remote_code=config.trust_remote_code)
    presets = preset_names(recipe)
    return compare(
        LocalLM(reference, tokenizer),
        LocalLM(quantized, tokenizer),
        presets,
        EvalMaterial(gathered.held_out_MT),
        sizes=preset_sizes(quantized, presets),
        seed=config.seed,
    )


def write_card(saved: Path, name: str, run, numbers: Mapping[str, Any], config: QuantizeConfig) -> None:
    """The model card, and the run beside it; both may change without making the checkpoint another one."""
    from polybit.core.records import RUN_FILE
    from polybit.core.runtime import atomic_path, write_json
    from polybit.report.card import model_card

    record = {**run.to_json(), "numbers": numbers, "command": command_line(name, config)}
    with atomic_path(saved / "README.md") as staged:
        staged.write_text(model_card(name, record), encoding="utf-8")
    write_json(saved / RUN_FILE, record)


def command_line(name: str, config: QuantizeConfig) -> str:
    """The command that repeats this run: the flags that differ from their defaults."""
    words = ["polybit", "quantize", name, "--out", str(config.out)]
    for key, value in asdict(config).items():
        default = QuantizeConfig.__dataclass_fields__[key].default
        if key in ("out", "json", "overwrite", "restart") or value == default:
            continue
        flag = key.replace("_", "-")
        words += (
            [f"--{flag}" if value is True else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return shlex.join(words)


def print_result(name: str, config: QuantizeConfig, numbers: Mapping[str, Any]) -> None:
    """What was made, what it costs, and what to type next."""
    from polybit.report.summary import terminal_table
    from polybit.report.tables import percent, size

    if "measured" in numbers:
        print(terminal_table(numbers["measured"]))
    print(
        f"\n{config.out}: {len(numbers['layers'])} layers at {', '.join(numbers['presets'])}, "
        f"{numbers['stored_bits_per_weight']:.2f} stored bits per weight; {percent(numbers['float_share'])} of the "
        "model's weights stay in float. Saved, reloaded and compared: equal."
    )
    added = numbers.get("rotation", {}).get("untied_head_bytes", 0)
    if added:
        print(
            "Rotated: the output head, which was the embedding, is a weight of its own now and adds "
            f"{size(added)} to the file, since the gains of the last norm are in it."
        )
    print(f'Next: polybit generate {config.out} --prompt "Hello" --precision {numbers["presets"][-1]}')
    print(f"      polybit eval {config.out} --reference {name} --json eval.json")
    print(f"      polybit report {config.out} --eval eval.json --out report.html")
