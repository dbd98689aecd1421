"""Read the JSON and the safetensors headers of a model directory without trusting them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError

LARGEST_JSON = 256 << 20  # bytes
LARGEST_HEADER = 100 << 20  # bytes, safetensors' own limit
LARGEST_NUMBER = (1 << 31) - 1  # no size in a model configuration reaches this
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
SIZE_KEYS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner", "vocab_size", "head_dim")

Header = dict[str, tuple[str, tuple[int, ...]]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; not UTF-8, not JSON, NaN, duplicate keys, or anything but an object is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except FileNotFoundError:
        raise PolybitError(f"{path} is missing: the directory is incomplete, fetch or make it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PolybitError(f"{path} cannot be read as JSON ({error!s:.120}): it is damaged, make it again") from None
    if not isinstance(value, dict):
        raise PolybitError(f"{path} holds {type(value).__name__}, not a JSON object: it is damaged, make it again")
    return value


def read_header(path: Path) -> Header:
    """Tensor name -> (dtype, shape) of one safetensors file, without reading its tensors.

    safetensors itself refuses overlapping, overflowing and truncated data; duplicate names it accepts, we do not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            names = set(opened.keys())
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            pairs = json.loads(handle.read(min(length, LARGEST_HEADER)), object_pairs_hook=list)
    except FileNotFoundError:
        raise PolybitError(f"{path} is missing: the model is incomplete, fetch or make it again") from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise PolybitError(
            f"{path} ({size} bytes) is no whole safetensors file ({one_line(error)}): fetch or make it again"
        ) from None
    found: Header = {}
    for name, entry in pairs:
        if name == "__metadata__":
            continue
        if name in found:
            raise PolybitError(f"{path} names the tensor {name!r:.120} twice: it was tampered with, make it again")
        values = dict(entry)
        found[name] = values["dtype"], tuple(values["shape"])
    assert set(found) == names
    return found


def one_line(error: Exception) -> str:
    """The beginning of what an error says, without line breaks."""
    return " ".join(str(error).split())[:100]


def read_headers(paths: Iterable[Path]) -> Header:
    """The headers of all shards together; a tensor in two shards is refused."""
    found: Header = {}
    for path in paths:
        header = read_header(path)
        twice = sorted(found.keys() & header.keys())
        if twice:
            raise PolybitError(f"{path} repeats the tensor {twice[0]!r:.120} of another shard: remove the stray file")
        found |= header
    return found


def shards_of(index_path: Path) -> list[Path]:
    """The shard files an index names, each a plain name beside it that exists."""
    index = read_json(index_path)
    table = index.get("weight_map")
    if not isinstance(table, Mapping) or not table or not all(isinstance(name, str) for name in table.values()):
        raise PolybitError(f"{index_path} has no 'weight_map' of tensors to files: it is damaged, make it again")
    paths = []
    for name in sorted(set(table.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise PolybitError(f"{index_path} names the shard {name!r:.80}: only *.safetensors beside it are read")
        if not (index_path.parent / name).is_file():
            raise PolybitError(f"{index_path.parent / name} is missing, though the index names it: fetch it again")
        paths.append(index_path.parent / name)
    return paths


def check_sizes(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration whose numbers cannot belong to `tensors` tensors, before a module is built."""
    for scope in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, value in scope.items():
            if not isinstance(value, int) or isinstance(value, bool):
                if key in LAYER_KEYS + SIZE_KEYS and value is not None and not isinstance(value, (list, Mapping)):
                    raise PolybitError(f"{path} says {key} = {value!r:.40}: it must be a whole number")
                continue
            too_many = key in LAYER_KEYS and value > tensors
            negative = key in LAYER_KEYS + SIZE_KEYS and value < 0
            if too_many or negative or abs(value) > LARGEST_NUMBER:
                raise PolybitError(
                    f"{path} says {key} = {value!s:.40}, which the {tensors} tensors beside it cannot fill: "
                    "the configuration was edited or belongs to another model"
                )
