"""Pieces: a file written from them is the file safetensors writes, and reading gives the same bits.

Kinds: oracle (safetensors), properties, refusals.
"""

import random
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from polybit.core.runtime import PolybitError
from polybit.hub import pieces
from polybit.hub.files import read_entries
from polybit.hub.pieces import read_places, same_pieces, write_pieces
from polybit.hub.tensors import read_tensors, write_tensors


@pytest.fixture
def tensors():
    """One of every type, some empty, some with names that are no ASCII."""
    kinds = [*pieces.DTYPES.values(), torch.float32, torch.uint8]
    return {f"ä{n}.{'xyz'[n % 3]}": torch.arange(5 * n).view(n, 5).to(kind) for n, kind in enumerate(kinds)}


def test_the_file_is_the_one_safetensors_writes(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 24)
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    places = read_places([tmp_path / "whole"])
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_pieces(tmp_path / "pieces", shapes, lambda name: places[name].pieces(), {"format": "pt"})
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    for name, place in places.items():
        assert torch.equal(place[...], tensors[name])
        assert place.shape[0] < 2 or torch.equal(place.rows(1, place.shape[0] - 1), tensors[name][1:-1])


def test_equality_is_of_bits_however_the_pieces_are_cut():
    one = torch.randn(50)
    other = one.clone()
    assert same_pieces(iter(one.split(7)), iter(other.split(11)))
    assert not same_pieces(iter(one.split(7)), iter(other[:-1].split(11)))
    other[30] = -other[30]
    assert not same_pieces(iter(one.split(7)), iter(other.split(11)))
    assert not same_pieces(iter([torch.tensor([0.0])]), iter([torch.tensor([-0.0])]))


def test_too_few_values_and_a_cut_file_are_refused(tmp_path):
    with pytest.raises(PolybitError, match="8 bytes instead of 12"):
        write_pieces(tmp_path / "x", {"a": torch.zeros(3)}, lambda _: iter([torch.zeros(2)]), {})
    save_file({"a": torch.zeros(100)}, tmp_path / "y")
    (place,) = read_places([tmp_path / "y"]).values()
    (tmp_path / "y").write_bytes((tmp_path / "y").read_bytes()[:-9])
    with pytest.raises(PolybitError, match="ends before its tensors"):
        list(place.pieces())


def test_the_same_tensors_and_remarks_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(6).view(2, 3), "a": torch.rand(5)}
    notes = {letter: letter * 3 for letter in "fcadbe"}
    for number in range(6):
        write_tensors(tmp_path / str(number), tensors, notes=notes)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(6)}) == 1
    found, said = read_tensors(tmp_path / "0")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors) and notes.items() < said.items()


def test_a_header_is_refused_where_safetensors_refuses_it(tensors, tmp_path):
    """Headers with a few characters changed, left out or put in, and files cut at any byte."""
    path, draw = tmp_path / "x", random.Random(0)
    save_file(tensors, path, metadata={"format": "pt"})
    good = path.read_bytes()
    length = 8 + struct.unpack("<Q", good[:8])[0]
    refused = 0
    for _ in range(1500):
        torn = bytearray(good)
        for _ in range(draw.choice((1, 1, 2))):
            at = draw.randrange(length)
            torn[at : at + draw.choice((0, 1, 1))] = draw.choices(
                b'0123456789{}[]",:. eFU\\\x00\xff', k=draw.choice((0, 1))
            )
        if draw.random() < 0.2:
            del torn[draw.randrange(len(torn)) :]
        elif draw.random() < 0.7 and len(torn) != len(good):
            torn[:8] = struct.pack("<Q", length - 8 + len(torn) - len(good))
        path.write_bytes(torn)
        try:
            with safe_open(str(path), framework="pt") as opened:
                theirs = set(opened.keys())
        except SafetensorError:
            theirs = None
        try:
            ours = set(read_entries(path)[0])
        except PolybitError as error:
            ours, refused = None, refused + 1
            theirs = None if "twice" in str(error) else theirs
        assert ours == theirs or b"-0" in torn[:length]
    assert 500 < refused < 1490


def test_a_file_that_goes_away_is_one_sentence(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "x")
    (place,) = read_places([tmp_path / "x"]).values()
    (tmp_path / "x").unlink()
    with pytest.raises(PolybitError, match=r"cannot be read any more .*nothing finished is lost"):
        place[...]
