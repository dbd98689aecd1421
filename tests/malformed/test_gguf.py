"""GGUF files whose head says what is not so: one sentence at once, no walk past the end, no weight of another place."""

import struct

import numpy as np
import pytest

from polybit.core.runtime import PolybitError
from polybit.hub.gguf_header import check_gguf

gguf = pytest.importorskip("gguf")


def write(path, *, keys=(), endian=None):
    """A file of two tensors of one block, and the keys of a model of that size."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endian or gguf.GGUFEndian.LITTLE)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    for name, value in keys:
        writer.add_uint32(name, value)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endian", gguf.GGUFEndian)
def test_a_good_file_passes_in_both_byte_orders(endian, tmp_path):
    check_gguf(write(tmp_path / "a.gguf", endian=endian))


def number(data, name, value, *, skip, letter="<Q"):
    """The number that stands `skip` bytes after a name, replaced."""
    at = data.index(name) + len(name) + skip
    return data[:at] + struct.pack(letter, value) + data[at + struct.calcsize(letter) :]


AFTER_SHAPE = 4 + 16 + 4  # dimensions, two sides, type; then the offset
DAMAGE = {
    "an array that is longer than the file": (lambda d: number(d, b"ggml.scores", 1 << 40, skip=8), "values and more"),
    "an array a little too long": (lambda d: number(d, b"ggml.scores", 1 << 20, skip=8), "would take"),
    "a name that is longer than the file": (lambda d: number(d, b"", 1 << 40, skip=24), "would take"),
    "arrays of arrays": (lambda d: number(d, b"ggml.scores", 9, skip=4, letter="<I"), "read nowhere"),
    "a value of no type": (lambda d: number(d, b"ggml.scores", 13, skip=0, letter="<I"), "which there is not"),
    "counts": (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "its counts"),
    "a version to come": (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], "version is 9"),
    "a tensor in another's place": (lambda d: number(d, b"attn_k.weight", 0, skip=AFTER_SHAPE), "not at 512"),
    "a tensor of no type": (lambda d: number(d, b"attn_k.weight", 99, skip=20, letter="<I"), "type 99"),
    "a tensor of narrower numbers": (lambda d: number(d, b"attn_k.weight", 1, skip=20, letter="<I"), "goes on"),
    "a tensor of half a block": (lambda d: number(d, b"attn_k.weight", 12, skip=20, letter="<I"), "rows are of 256"),
    "a tensor without rows": (lambda d: number(d, b"attn_k.weight", 0, skip=4), "has the shape"),
    "a name in no UTF-8": (lambda d: d.replace(b"attn_k", b"attn\xff\xff"), "no UTF-8"),
    "two tensors of one name": (lambda d: d.replace(b"attn_k", b"attn_q"), "twice"),
    "cut short": (lambda d: d[:-1], "would take"),
    "cut in the head": (lambda d: d[:90], "would take|requires"),
    "nearly empty": (lambda d: d[:20], "ends before"),
    "a size no tensor has": (lambda d: number(d, b"embedding_length", 10**9, skip=4, letter="<I"), "longer than 32"),
    "blocks that are not there": (lambda d: number(d, b"block_count", 10**9, skip=4, letter="<I"), "of 1 blocks"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_sentence(what, tmp_path):
    change, said = DAMAGE[what]
    path = write(tmp_path / "a.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(PolybitError, match=f"no whole GGUF file.*({said})") as caught:
        check_gguf(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "value"), [("general.alignment", 24), ("llama.attention.head_count", 33), ("split.count", 3)]
)
def test_keys_that_do_not_fit(name, value, tmp_path):
    path = write(tmp_path / "a.gguf", keys=[("x." + name[2:], value)])  # as long a name, and then the right one
    path.write_bytes(path.read_bytes().replace(("x." + name[2:]).encode(), name.encode()))
    with pytest.raises(PolybitError, match="no whole GGUF file"):
        check_gguf(path)
