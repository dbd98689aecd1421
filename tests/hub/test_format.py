"""Reference: a reader written from the sentences of docs/format.md alone decodes what the package decodes."""

import json
import struct

import pytest
import torch

from polybit.hub.checkpoint import save
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import use
from tests.families import quantized


def raw_tensors(path):
    """Name -> (dtype, shape, bytes) of a safetensors file, read by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], data[8 + length + start : 8 + length + stop]
    return found


def half(data, index):
    """The IEEE binary16 number at an index."""
    return struct.unpack_from("<e", data, 2 * index)[0]


def weight(name, numbers, tensors, row, column, width):
    """One weight at one width."""
    (rows, columns), bits, size = numbers["shape"], numbers["bits"], numbers["group_size"]
    row_blocks, column_blocks = -(-rows // 16), -(-columns // 32)
    groups = -(-columns // size) if size else 1
    block, r = divmod(row, 16)
    group = column // size if size else 0
    centre = lambda b: (2**b - 1) / 2  # noqa: E731
    part, first, shared = 0, column // 32, centre(bits)
    if "group_bits" in numbers:
        # groups widest first, equal widths in their order; the groups of one width are a part with its own planes
        stored = [int(digit) for digit in numbers["group_bits"]]
        lengths = [min(size // 32, column_blocks - g * (size // 32)) for g in range(groups)]
        bits = stored[group]
        before = [g for g in range(groups) if (-stored[g], g) < (-bits, group)]
        part = sum(lengths[g] * stored[g] * row_blocks * 64 for g in before if stored[g] != bits)
        first = sum(lengths[g] for g in before if stored[g] == bits) + column // 32 - group * (size // 32)
        column_blocks = sum(n for n, b in zip(lengths, stored, strict=True) if b == bits)
        group, width = len(before), min(width, bits)
    prefix = 0
    for plane in range(width):
        at = part + ((plane * row_blocks + block) * column_blocks + first) * 64
        i, t = divmod(column % 32, 4)
        prefix = 2 * prefix + ((tensors[f"{name}.qplanes"][2][at + 4 * r + t] >> i) & 1)
    place = (block * groups + group) * 16 + r
    scale = half(tensors[f"{name}.scale"][2], place) * numbers["gain"]
    # a zero point that all groups share is that of the widest; narrower ones are as far from their middle
    own = numbers["zero"] == "group"
    zero = tensors[f"{name}.zero"][2][place] if own else centre(bits) - (shared - numbers["zero"])
    low, high, grouped = numbers["ratios"].get(str(width), [1.0, 1.0, False]) if width < bits else (1.0, 1.0, False)
    index = 0
    if grouped:
        byte = tensors[f"{name}.ratio_{width}"][2][(block * groups + group) * 8 + r % 8]
        index = byte >> 4 if r >= 8 else byte & 15
    ratio = low + (high - low) * index / 15
    column_scale = half(tensors[f"{name}.column_scale"][2], column) if numbers["column_scale"] else 1.0
    step = 2 ** (bits - width) * ratio * (prefix - centre(width))
    return scale * (step + centre(bits) - zero) * column_scale


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
def test_reader_written_from_the_page(family, ragged, tmp_path):
    model = quantized(family, include_embeddings=True, bits=6, ragged=ragged)
    path = save(model, tmp_path / "out")
    layers = json.loads((path / "config.json").read_text())["quantization_config"]["layers"]
    tensors = raw_tensors(path / "polybit.safetensors")
    generator = torch.Generator().manual_seed(0)
    assert layers.keys() == {name for name, layer in model.named_modules() if isinstance(layer, QuantWeight)}
    for name, numbers in layers.items():
        for width in (6, 5, 4, 2):
            decoded_OI = use(model, width).get_submodule(name).decode()
            for _ in range(10):
                row, column = (int(torch.randint(n, (), generator=generator)) for n in numbers["shape"])
                found = weight(name, numbers, tensors, row, column, width)
                assert found == pytest.approx(float(decoded_OI[row, column]), rel=1e-5, abs=1e-7)
