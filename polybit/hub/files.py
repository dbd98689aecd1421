"""Read the JSON and the safetensors headers of a model directory without trusting them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError

LARGEST_JSON = 256 << 20  # bytes
LARGEST_HEADER = 100 << 20  # bytes, safetensors' own limit
LARGEST_NUMBER = (1 << 31) - 1  # no size in a model configuration reaches this
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
SIZE_KEYS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner", "vocab_size", "head_dim")

BITS = {  # of one number, by safetensors' spelling of its type
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}

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


@dataclass(frozen=True, slots=True)
class Entry:
    """What a safetensors header says of one tensor; start: the byte of the file at which its values begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(the tensors of one safetensors file, its remarks), without reading or mapping the tensors.

    safetensors itself maps the whole file to look at its header, twice for torch, which an address space may have no
    room for. Refused is what it refuses (overlapping, overflowing, truncated data), and names that come twice.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            text = handle.read(length).decode()
        if not text.startswith("{"):
            raise ValueError("its header is no JSON object")
        pairs = json.loads(text, object_pairs_hook=list)
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
            raise PolybitError(f"{path} names the tensor {twice!r:.120} twice: it was tampered with, make it again")
        remarks = dict(found.pop("__metadata__", None) or [])
        if not all(isinstance(said, str) for said in remarks.values()):
            raise ValueError("a remark is no text")
        entries = {name: dict(entry) for name, entry in found.items()}
        check_layout(entries, size - 8 - length)
    except FileNotFoundError:
        raise PolybitError(f"{path} is missing: the model is incomplete, fetch or make it again") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise PolybitError(
            f"{path} ({size} bytes) is no whole safetensors file ({one_line(error)}): fetch or make it again"
        ) from None
    places = {n: Entry(e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0]) for n, e in entries.items()}
    return places, remarks


def check_layout(entries: Mapping[str, Mapping[str, Any]], size: int) -> None:
    """Refuse, with a ValueError, tensors that do not fill `size` bytes one after another, each as its shape says."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: list(item[1]["data_offsets"])):
        start, stop = entry["data_offsets"]
        numbers = [start, stop, *entry["shape"]]
        if not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
            raise ValueError(f"{name!r:.60} has a size that is no whole number")
        bits = prod(entry["shape"]) * BITS[entry["dtype"]]
        if start != at or bits != 8 * (stop - start):
            raise ValueError(f"{name!r:.60} does not lie where its shape and its neighbours say")
        at = stop
    if at != size:
        raise ValueError(f"its tensors take {at} bytes, and {size} are there")


def read_header(path: Path) -> Header:
    """Tensor name -> (dtype, shape) of one safetensors file, without reading its tensors."""
    return {name: (entry.dtype, entry.shape) for name, entry in read_entries(path)[0].items()}


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
            raise double(path, twice[0])
        found |= header
    return found


def double(path: Path, name: str) -> PolybitError:
    """What is wrong with a file that holds a tensor of another one."""
    return PolybitError(f"{path} repeats the tensor {name!r:.120} of another shard: remove the stray file")


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
