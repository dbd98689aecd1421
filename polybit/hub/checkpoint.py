"""Our checkpoint: save it atomically, describe it in config.json, validate it before a module is built, verify it.

docs/format.md says what every file must hold. Nothing is ever pickled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polybit
from polybit.core.plan import Plan
from polybit.core.precision import FLOAT
from polybit.core.records import Rotation
from polybit.core.runtime import PolybitError, write_json
from polybit.hub.directory import absolute, check_manifest, restore, staged_directory
from polybit.hub.files import Header, check_sizes, read_headers, read_json, shards_of
from polybit.hub.peft import write_adapters
from polybit.hub.pieces import NAMES, Pieces, checked, read_places, same_pieces, write_pieces
from polybit.nn.board import panel
from polybit.nn.convert import is_kind
from polybit.nn.fields import Fields, check_columns, is_integer
from polybit.nn.switch import stored_layers

METHOD, VERSION = "polybit", 1
SINGLE, INDEX = "polybit.safetensors", "polybit.safetensors.index.json"
KEYS = {"quant_method", "format_version", "polybit_version", "weights", "widths", "presets", "layers", "notes"}
LARGEST_MODEL = 1_000_000  # layers; more cannot be meant
SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Description:
    """What config.json says about the quantized part of a checkpoint.

    weights: the file (or index) with the tensors · widths: the weight widths it was made for, widest first ·
    presets: named plans · layers: name -> numbers of its stored weight · kinds: name -> how the float model stored it ·
    notes: free remarks on how it was made; of a rotated model, how it was rotated.
    """

    weights: str
    widths: tuple[int, ...]
    presets: Mapping[str, Plan]
    layers: Mapping[str, Fields]
    kinds: Mapping[str, str]
    notes: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": METHOD,
            "format_version": VERSION,
            "polybit_version": polybit.__version__,
            "weights": self.weights,
            "widths": list(self.widths),
            "presets": {name: plan.to_json() for name, plan in self.presets.items()},
            "layers": {name: {"kind": self.kinds[name], **f.to_json()} for name, f in self.layers.items()},
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Description:
        """The inverse of to_json; every key and range is checked, a newer format is named as such."""
        version = value.get("format_version")
        if value.get("quant_method") != METHOD:
            raise PolybitError(f"the checkpoint's quant_method is {value.get('quant_method')!r:.60}, not 'polybit'")
        if is_integer(version, VERSION + 1, 10**6):
            made_by = value.get("polybit_version")
            raise PolybitError(
                f"the checkpoint has format {version}, written by a newer polybit ({made_by!s:.20}), and this is "
                f"{polybit.__version__} for format {VERSION}: upgrade polybit"
            )
        if version != VERSION or isinstance(version, bool):
            raise PolybitError(f"the checkpoint's format_version is {version!r:.40}: it must be {VERSION}")
        for key in sorted(KEYS ^ set(value)):
            fault = "lacks the key" if key in KEYS else "has the unknown key"
            raise PolybitError(f"the checkpoint's quantization_config {fault} {key!r:.60}: it is damaged or was edited")
        if value["weights"] not in (SINGLE, INDEX):
            raise PolybitError(f"the checkpoint's weights are {value['weights']!r:.80}: only {SINGLE!r} or {INDEX!r}")
        layers, kinds = read_layers(value["layers"])
        widths = read_widths(value["widths"], max(fields.bits for fields in layers.values()))
        presets = read_presets(value["presets"], layers)
        if not isinstance(value["notes"], Mapping):
            raise PolybitError("the checkpoint's notes must be an object")
        if "rotation" in value["notes"]:
            Rotation.from_json(value["notes"]["rotation"])
        return cls(value["weights"], widths, presets, layers, kinds, value["notes"])


def read_layers(value: Any) -> tuple[dict[str, Fields], dict[str, str]]:
    """The quantized layers and their kinds, checked."""
    if not isinstance(value, Mapping) or not 0 < len(value) <= LARGEST_MODEL:
        raise PolybitError(f"the checkpoint's layers must be an object of 1 to {LARGEST_MODEL} entries")
    layers, kinds = {}, {}
    for name, entry in value.items():
        if not isinstance(entry, Mapping) or not is_kind(entry.get("kind")):
            raise PolybitError(f"the config gives layer {name!r:.120} no kind polybit knows: it was edited")
        layers[name] = Fields.from_json(name, {key: entry[key] for key in entry if key != "kind"})
        kinds[name] = entry["kind"]
    return layers, kinds


def read_widths(value: Any, stored: int) -> tuple[int, ...]:
    """Widths the checkpoint was made for, widest first, none above what is stored."""
    good = isinstance(value, list) and value and all(is_integer(width, 2, stored) for width in value)
    if not good or sorted(set(value), reverse=True) != value:
        raise PolybitError(
            f"the checkpoint's widths are {value!r:.80}: they must be whole numbers from 2 to the stored {stored}, "
            "each once, widest first"
        )
    return tuple(value)


def read_presets(value: Any, layers: Mapping[str, Fields]) -> dict[str, Plan]:
    """Named plans, each of which the stored layers can serve."""
    if not isinstance(value, Mapping):
        raise PolybitError(f"the checkpoint's presets are {value!r:.80}: they must be an object of plans")
    presets = {}
    for name, entry in value.items():
        plan = Plan.from_json(entry)
        # a plan may name the attention that owns a layer, for its q, k and v; the model is asked when it is built
        plan.check_names({*layers, *(layer.rpartition(".")[0] for layer in layers)})
        check_columns(plan, layers)
        for layer, fields in layers.items():
            if fields.bits < plan.at(layer).w != FLOAT:
                raise PolybitError(
                    f"preset {name!r:.60} wants {plan.at(layer).w} bits for layer {layer!r:.120}, "
                    f"of which {fields.bits} are stored: the checkpoint was edited, make it again"
                )
        presets[str(name)] = plan
    return presets


def describe(
    model: nn.Module,
    *,
    weights: str = SINGLE,
    widths: tuple[int, ...] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Description:
    """The description of a quantized model in memory; without `widths`, the widest stored one."""
    board, stored = panel(model), stored_layers(model)
    layers = {name: layer.fields for name, layer in stored.items()}
    kinds = {name: layer.kind for name, layer in stored.items()}
    top = max(fields.bits for fields in layers.values())
    chosen = tuple(sorted(set(widths or (top,)), reverse=True))
    rotation = board.rotation
    noted = {**(notes or {}), **({} if rotation is None else {"rotation": rotation.to_json()})}
    return Description(weights, read_widths(list(chosen), top), dict(board.presets), layers, kinds, noted)


def save(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Any = None,
    widths: tuple[int, ...] | None = None,
    notes: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    pieces: Pieces | None = None,
    verified: bool = False,
) -> Path:
    """Write a quantized model as a directory that plain transformers loads when polybit is installed; returns its path.

    The model's presets (`set_presets`) are stored with it, and the adapters they have. files: further text files (a
    model card, a plan), name -> content. pieces: where the values of a model come from that is only a skeleton. The
    directory appears whole or not at all; an existing checkpoint is replaced only with `overwrite`. verified: it
    appears once everything was read back and is what was to be saved.
    Raises PolybitError for an output that cannot be written, a full disk, or a weight that is not finite.
    """
    tensors = dict(stored_tensors(model))
    groups = split_shards(tensors, shard_bytes)
    description = describe(model, weights=SINGLE if len(groups) == 1 else INDEX, widths=widths, notes=notes)
    check = partial(verify, model=model, pieces=pieces) if verified else None
    with staged_directory(Path(out), overwrite=overwrite, check=check) as stage:
        write_weights(stage, groups, tensors, pieces)
        write_configuration(stage, model, description)
        write_adapters(model, stage, base_model=str(description.notes.get("base_model", "")))
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        for name, content in (files or {}).items():
            if Path(name).name != name or (stage / name).exists():
                raise PolybitError(f"{name!r:.80} cannot be a further file of a checkpoint: give a new plain name")
            (stage / name).write_text(content, encoding="utf-8")
    return absolute(Path(out))


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor a checkpoint holds, each once: parameters, tied ones under their first name, and lasting buffers."""
    kept = set(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept:
            yield name, tensor.detach()


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity; quantized scales are 16-bit floats behind an int16 mask."""
    for name, tensor in tensors.items():
        masked = tensor.dtype == torch.int16 and name.rpartition(".")[2] in ("scale", "column_scale")
        values = tensor.view(torch.float16) if masked else tensor
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise PolybitError(f"{name} holds NaN or infinity: a model with such a weight is not saved")


def split_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order, no shard above `shard_bytes` unless one tensor is."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_weights(
    stage: Path, groups: list[list[str]], tensors: Mapping[str, Tensor], pieces: Pieces | None = None
) -> None:
    """The safetensors files, and their index when there are several."""
    table: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"polybit-{number:05d}-of-{len(groups):05d}.safetensors"
        shapes = {name: tensors[name] for name in names}
        values = pieces or (lambda name: iter([tensors[name].cpu()]))
        write_pieces(stage / file, shapes, checked(values, check_finite), {"format": "pt"})
        table |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": table})


def write_configuration(stage: Path, model: nn.Module, description: Description) -> None:
    """config.json with our description in it, and generation_config.json."""
    config: Any = copy.deepcopy(model.config)
    config.quantization_config = description.to_json()
    config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config.architectures = [type(model).__name__]
    config.save_pretrained(stage)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(stage)


def validate(directory: str | Path) -> Description:
    """Check a whole checkpoint without building a module: manifest, configuration, tensor names, shapes, scales.

    Raises PolybitError naming the file or the layer at fault.
    """
    directory = absolute(Path(directory))
    restore(directory)
    if not directory.is_dir():
        raise PolybitError(f"{directory} is no directory: give the directory a checkpoint was saved to")
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        raise PolybitError(f"{directory / 'config.json'} has no quantization_config: this is no polybit checkpoint")
    description = Description.from_json(quantization)
    listed = check_manifest(directory)
    shards = weight_files(directory, description)
    unlisted = [path.name for path in shards if path.name not in listed]
    if unlisted:
        raise PolybitError(f"{directory / unlisted[0]} is not in the manifest: make the checkpoint again")
    header = read_headers(shards)
    check_tensors(description, header)
    check_sizes(directory / "config.json", config, len(header))
    check_scales(description, shards)
    return description


def weight_files(directory: Path, description: Description) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if description.weights == SINGLE:
        return [directory / SINGLE]
    return shards_of(directory / INDEX)


def check_tensors(description: Description, header: Header) -> None:
    """The quantized tensors must be exactly the declared ones, with their types and shapes."""
    declared = declared_tensors(description)
    for name, (dtype, shape) in declared.items():
        if name not in header:
            raise PolybitError(f"the tensor {name!r:.160} is missing from the checkpoint: make it again")
        if header[name] != (dtype, shape):
            found, size = header[name]
            raise PolybitError(
                f"the tensor {name!r:.160} is {found} {size} in the file, the config declares {dtype} {shape}: "
                "one of them was edited, make the checkpoint again"
            )
    for name, (dtype, shape) in header.items():
        if name not in declared and (dtype in ("U8", "I16") or not prod(shape)):
            raise PolybitError(f"the tensor {name!r:.160} ({dtype} {shape}) is not declared by the config: remove it")


def declared_tensors(description: Description) -> Header:
    """Name -> (dtype, shape) of every quantized tensor the configuration declares."""
    return {
        f"{layer}.{leaf}": (NAMES[dtype], shape)
        for layer, fields in description.layers.items()
        for leaf, (shape, dtype) in fields.tensors().items()
    }


def check_scales(description: Description, shards: list[Path]) -> None:
    """Refuse scales that are NaN or infinite."""
    names = {f"{layer}.{leaf}" for layer in description.layers for leaf in ("scale", "column_scale")}
    for name, place in (read_places(shards) or {}).items():
        if name in names:
            for piece in place.pieces():
                check_finite({name: piece})


def verify(directory: str | Path, model: nn.Module, *, pieces: Pieces | None = None) -> Description:
    """Read a saved checkpoint back and compare every tensor with what was saved, bit for bit, a piece at a time.

    pieces: where the values of a model come from that is only a skeleton
    """
    description = validate(directory)
    if description.layers != describe(model).layers:
        raise PolybitError(f"{directory} does not describe the layers of the model that was saved: save it again")
    expected = dict(stored_tensors(model))
    places = read_places(weight_files(absolute(Path(directory)), description)) or {}
    for name, place in places.items():
        ours = expected.pop(name, None)
        unlike = ours is None or (ours.dtype, tuple(ours.shape)) != (place.dtype, place.shape)
        if ours is None or unlike or not same_pieces(place.pieces(), pieces(name) if pieces else iter([ours.cpu()])):
            raise PolybitError(f"{place.path} does not hold the {name!r:.120} that was saved: the disk may be failing")
    if expected:
        raise PolybitError(f"{directory} lacks {next(iter(expected))!r:.120}, which was saved: the disk may be failing")
    return description
