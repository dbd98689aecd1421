"""What a checkpoint says of itself: stored widths, bits per weight and bytes at each, the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polybit.core.affine import group_lengths
from polybit.core.plan import PLAN, Plan
from polybit.core.planes import Planes, read_widths
from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import warn
from polybit.nn.adapters import worn_bytes
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import at
from polybit.nn.switch import presets as presets_of


def quantized_layers(model) -> Mapping[str, Any]:
    """Quantized modules by name; empty for a float model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}


def described(
    model,
    presets: Sequence[str],
    *,
    errors: Mapping[str, Mapping[str, float]],
    left_in_float: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Sizes at every preset, per layer and together, and what stays in float.

    errors: relative errors by layer and preset
    left_in_float: a row per weight that is not quantized, with its share of the model
    """
    quantized = quantized_layers(model)
    layers: dict[str, Any] = {
        key: {"shape": [layer.rows, layer.columns], "bytes": {}, "relative_error": errors.get(key)}
        for key, layer in quantized.items()
    }
    for preset in presets:
        with at(model, preset):
            for key, layer in quantized.items():
                layers[key]["bytes"][preset] = bytes_read(layer.planes, layer.reading)
    return {
        "presets": list(presets),
        "stored_bits_per_weight": stored_bits_per_weight(model),
        "sizes": preset_sizes(model, presets),
        "float_share": sum(row["share"] for row in left_in_float),
        "left_in_float": list(left_in_float),
        "layers": layers,
    }


def declared(model) -> Any:
    """The quantization part of the model's configuration, or None."""
    return getattr(model.config, "quantization_config", None)


def stored_widths(model) -> tuple[int, ...] | None:
    """Widths the checkpoint was made for, widest first; None for a float model."""
    if not quantized_layers(model):
        return None
    return tuple(sorted(field(declared(model), "widths"), reverse=True))


def plain_widths(model) -> tuple[int, ...]:
    """Stored widths that every quantized layer has, widest first; () for a float model and a file made by a plan, also
    one whose layers are alike."""
    if PLAN in presets_of(model) and len(stored_widths(model) or ()) == 1:
        return ()
    least = min((layer.bits for layer in quantized_layers(model).values()), default=0)
    return tuple(b for b in stored_widths(model) or () if b <= least)


def named_plans(model) -> dict[str, Plan]:
    """The plans a checkpoint has beside its plain widths."""
    return {name: plan for name, plan in presets_of(model).items() if name not in {f"w{b}" for b in range(1, 9)}}


def default_presets(model) -> list[str]:
    """What a checkpoint is measured at unless told otherwise: its widths where every layer has them, and its plans.

    Each once: where the ends keep bits of their own, the plain widths are plans too.
    """
    return list(dict.fromkeys([*(f"w{b}" for b in plain_widths(model)), *presets_of(model)]))


def warn_of_width(model, wanted: str) -> None:
    """Say so where a width is asked for that a checkpoint was not made for: its codes are then cut off."""
    made = default_presets(model) if quantized_layers(model) else [wanted]
    width = FLOAT if wanted in made or wanted in presets_of(model) else Precision.parse(wanted).w
    if width != FLOAT and f"w{width}" not in made:
        warn(
            f"this checkpoint was made for {', '.join(made)}; at w{width} its codes are cut off, and what it says may "
            "make no sense"
        )


def base_model(model) -> str | None:
    """The model a checkpoint says it was made from."""
    notes = field(declared(model), "notes") if declared(model) is not None else None
    return (notes or {}).get("base_model")


def field(record: Any, name: str) -> Any:
    """A field of the quantization part, which is an object or a plain dict."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


def preset_sizes(model, presets: Sequence[str]) -> dict[str, dict[str, float]]:
    """Effective bits per weight and bytes read of the quantized layers and their adapters, for each preset."""
    layers = quantized_layers(model)
    weights = sum(layer.rows * layer.columns for layer in layers.values())
    found = {}
    for preset in presets:
        with at(model, preset):
            read = {n: bytes_read(layer.planes, layer.reading) + worn_bytes(layer) for n, layer in layers.items()}
            bits = sum(effective_bits(one.planes, one.reading) + 8 * worn_bytes(one) for one in layers.values())
        found[preset] = {"bytes": sum(read.values()), "bits_per_weight": bits / max(weights, 1)}
    return found


def bytes_read(planes: Planes, reading: int | Sequence[int]) -> int:
    """Bytes a forward pass reads of one weight, padding included; reading: a width, or one per group."""
    return planes.nbytes(reading)


def effective_bits(planes: Planes, reading: int | Sequence[int]) -> float:
    """Bits of one weight as it is read, without padding: codes, 16-bit scales, zero points, the ratios read.

    reading: a width, or one per group. A width per group costs 8 bits a group once.
    """
    rows, columns = planes.shape
    read_G = read_widths(planes, reading)
    stored_G = planes.bits_G or (planes.bits,) * len(read_G)
    codes = sum(b * n for b, n in zip(read_G, group_lengths(columns, planes.group_size).tolist(), strict=True))
    zeros = 0 if isinstance(planes.zero, float) else sum(stored_G)
    tables = {b for b, table in planes.ratios.items() if table.index is not None}
    ratios = 4 * len(read_G) if tables & set(read_G) else 0
    column_scale = 0 if planes.column_scale is None else 16 * columns
    widths = 8 * len(read_G) if len(set(read_G)) > 1 else 0
    return rows * (codes + 16 * len(read_G) + zeros + ratios) + column_scale + widths


def stored_bits(planes: Planes) -> float:
    """Effective bits of all that is stored of one weight, as QWeight.bits_per_weight counts them."""
    rows, columns = planes.shape
    groups = planes.scale.shape[1]
    stored_G = planes.bits_G or (planes.bits,) * groups
    codes = sum(b * n for b, n in zip(stored_G, group_lengths(columns, planes.group_size).tolist(), strict=True))
    indexed = [table.index is not None for table in planes.ratios.values()]
    per_row = 16 * groups + (sum(stored_G) if isinstance(planes.zero, Tensor) else 0) + 4 * groups * sum(indexed)
    per_layer = sum(64 if each else 32 for each in indexed)
    per_layer += 0 if planes.column_scale is None else 16 * columns
    per_layer += 0 if planes.bits_G is None else 8 * groups
    return rows * (codes + per_row) + per_layer


def stored_bits_per_weight(model) -> float:
    """Effective bits per weight of all that is stored."""
    layers = quantized_layers(model)
    bits = sum(stored_bits(layer.planes) for layer in layers.values())
    return bits / max(sum(layer.rows * layer.columns for layer in layers.values()), 1)
