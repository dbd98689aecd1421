"""Pieces: a file written from them is the file safetensors writes, and reading gives the same bits.

Kinds: oracle (safetensors), properties, refusals.
"""

import pytest
import torch
from safetensors.torch import save_file

from polybit.core.runtime import PolybitError
from polybit.hub import pieces
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
