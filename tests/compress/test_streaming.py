"""Streaming: the codes of a model that is lent block by block are those of the model in memory, and no more than two
blocks' weights are there at once.

Kinds: reference (the walk over a model in memory), property (live tensors are counted), slow (resident memory).
"""

import gc
import json
import subprocess
import sys

import pytest
import torch

from polybit.compress import loop
from polybit.compress.ends import quantize_ends
from polybit.compress.loop import compress_in_place
from polybit.compress.recipe import choose
from polybit.compress.rows import is_large, round_rows
from polybit.compress.states import HiddenStates, Room
from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save, verify
from polybit.hub.lent import open_lent
from polybit.hub.load import open_model
from polybit.hub.workspace import Workspace
from polybit.nn.convert import targets
from polybit.nn.fields import tensors_of
from polybit.quant.rtn import rtn
from tests.families import FAMILIES, GROUPED, tiny_model


def text(count=3):
    """Batches of two windows."""
    return list(torch.randint(5, 60, (2 * count, 12), generator=torch.Generator().manual_seed(1)).split(2))


def recipe_of(method, **more):
    return choose(method, (4, 2) if method == "nested" else (3,), 32, **more)


def streamed(directory, out, recipe, *, room=None, embeddings=False, ends=16):
    """A checkpoint made block by block."""
    lent, store = open_lent(str(directory)), Workspace(out, {})
    chosen = targets(lent.model, include_embeddings=embeddings)
    errors = compress_in_place(lent.model, chosen, text(), recipe, store, source=lent, room=room or Room())
    quantize_ends(lent.model, ends, 32, source=lent, keep=store.write_planes)
    assert all(p.is_meta for p in lent.model.parameters())
    places = store.places()
    pieces = lambda name: places[name].pieces() if name in places else lent.pieces(name)  # noqa: E731
    verify(save(lent.model, out, widths=recipe.widths, pieces=pieces), lent.model, pieces=pieces)
    store.discard()
    return errors


def in_memory(directory, out, recipe, *, embeddings=False, ends=16):
    """The same checkpoint from a model in memory."""
    model, store = open_model(str(directory), dtype=torch.float32, trust_remote_code=False), Workspace(out, {})
    chosen = targets(model, include_embeddings=embeddings)
    errors = compress_in_place(model, chosen, text(), recipe, store)
    quantize_ends(model, ends, 32)
    save(model, out, widths=recipe.widths)
    store.discard()
    return errors


def same_files(one, other):
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_bytes(family, tmp_path):
    tiny_model(family).bfloat16().save_pretrained(tmp_path / "float")
    recipe = recipe_of("gptq")
    kept = [make(tmp_path / "float", tmp_path / make.__name__, recipe, ends=8) for make in (streamed, in_memory)]
    assert kept[0] == kept[1] and same_files(tmp_path / "streamed", tmp_path / "in_memory")


@pytest.mark.parametrize(
    ("method", "embeddings"), [("rtn", True), ("hqq", False), ("awq", False), ("nested", True), ("rounding", False)]
)
def test_every_method_gives_the_same_bytes(method, embeddings, tmp_path):
    tiny_model("llama-tied").save_pretrained(tmp_path / "float")
    recipe = recipe_of(method)
    if recipe.finish_steps:
        recipe = loop.replace(recipe, finish_steps=0, block_steps=3)
    room = Room(4000, tmp_path)  # less than one batch takes
    streamed(tmp_path / "float", tmp_path / "a", recipe, embeddings=embeddings, room=room)
    in_memory(tmp_path / "float", tmp_path / "b", recipe, embeddings=embeddings)
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "float"]


@pytest.mark.parametrize("method", ["gptq", "rounding", "rtn"])
def test_a_killed_run_ends_with_the_same_bytes(method, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "float")
    recipe = recipe_of(method, effort="fast")
    streamed(tmp_path / "float", tmp_path / "a", recipe)
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:  # in the second block
            raise KeyboardInterrupt
        return quantize_layer(*args, **kwargs)

    quantize_layer = loop.quantize_layer
    monkeypatch.setattr(loop, "quantize_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path / "float", tmp_path / "b", recipe)
    before = len(calls)
    gc.collect()  # the lock of the run that is no more
    streamed(tmp_path / "float", tmp_path / "b", recipe)
    assert len(calls) == before + 7 and same_files(tmp_path / "a", tmp_path / "b")


def weights_alive(shapes):
    """Bytes of all float tensors of these shapes that exist."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta and thing.is_floating_point():
            storage = thing.untyped_storage()
            if tuple(thing.shape) in shapes:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("make", [streamed, in_memory])
def test_no_more_than_two_blocks_are_alive(method, make, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = GROUPED | {"hidden_size": 64, "head_dim": 24, "intermediate_size": 128, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "float")
    layer = dict(model.model.layers[0].named_parameters())
    shapes = {tuple(p.shape) for p in layer.values() if p.ndim == 2}  # none is square, as statistics are
    block = sum(p.numel() * 4 for p in layer.values())
    del model, layer
    gc.collect()
    gc.freeze()  # what is there already is not walked through again
    most = [0]

    def looking(function):
        def look(*args, **kwargs):
            made = function(*args, **kwargs)
            most[0] = max(most[0], weights_alive(shapes))
            return made

        return look

    for where, name in ((loop, "quantize_layer"), (loop, "handed_on"), (loop, "relative_errors")):
        monkeypatch.setattr(where, name, looking(getattr(where, name)))
    monkeypatch.setattr(loop.VisitedBlock, "forward", looking(loop.VisitedBlock.forward))
    try:
        make(tmp_path / "float", tmp_path / "out", recipe_of(method))
    finally:
        gc.unfreeze()
    assert 0.9 * block < most[0]
    assert (most[0] <= 2 * block) == (make is streamed), f"{most[0] / block:.2f} blocks"


def test_states_come_back_from_wherever_they_are(tmp_path):
    values = [torch.randn(2, n, 4) for n in range(3, 9)]
    states = HiddenStates(Room(400, tmp_path))
    for value in values:
        states.append(value)
    assert states.room.taken <= 400 and any(kept is None for kept in states.kept) and not list(tmp_path.iterdir())
    assert all(torch.equal(one, other) for one, other in zip(states, values, strict=True))
    for index, value in enumerate(values):
        states[index] = -value
    assert all(torch.equal(one, -other) for one, other in zip(states, values, strict=True))
    states.clear()
    assert not len(states) and not states.room.taken
    with pytest.raises(PolybitError, match="cannot be written"):
        HiddenStates(Room(0, tmp_path / "nowhere")).append(values[0])


class Rows:
    """A matrix in memory that is read by rows."""

    def __init__(self, weight_OI):
        self.weight_OI, self.shape = weight_OI, tuple(weight_OI.shape)

    def rows(self, start, stop):
        return self.weight_OI[start:stop]


@pytest.mark.parametrize("zero", ["group", "centre", "level"])
@pytest.mark.parametrize("rows", [101, 160])
def test_rounding_by_rows_is_rounding_as_a_whole(zero, rows, monkeypatch):
    monkeypatch.setattr("polybit.quant.problem.SMALL", 1000)
    monkeypatch.setattr("polybit.compress.rows.PART", 1000)
    weight_OI = 0.02 * torch.randn(rows, 72, generator=torch.Generator().manual_seed(0))
    weight_OI[10], weight_OI[20] = 0, 1e-30
    weight_OI[30] *= 1e-9
    weight_OI[rows - 2] *= 9
    weight_OI[7, 3] = 0.9
    assert is_large(Rows(weight_OI))
    one, other = pack(rtn(weight_OI, None, Grid(4, 32, zero))), round_rows(Rows(weight_OI), Grid(4, 32, zero))
    assert one.gain == other.gain and one.shape == other.shape
    for leaf, tensor in tensors_of(one).items():
        assert torch.equal(tensor, tensors_of(other)[leaf]), leaf


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_the_model(tmp_path):
    from polybit.hub.random_model import Shape, random_float
    from polybit.hub.tiny import path

    above = {}
    for layers in (4, 24):
        directory, shape = tmp_path / str(layers), Shape(1024, layers, 2816, 32000, 16, 4)
        random_float(shape).save_pretrained(directory)
        for file in path().glob("tokenizer*"):
            (directory / file.name).write_bytes(file.read_bytes())
        code = (
            "import json, resource, sys, transformers\n"
            "from polybit.acts.quantize import quantize\n"
            "from polybit.options.quantize import QuantizeOptions\n"
            "options = QuantizeOptions(bits=4, method='rtn', measure=False, memory=1.0, out=sys.argv[2])\n"
            "print(json.dumps(quantize(sys.argv[1], options).numbers['peak_memory_bytes']))\n"
        )
        words = [sys.executable, "-c", code, str(directory), str(tmp_path / f"out{layers}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        above[layers] = json.loads(done.stdout.splitlines()[-1])
    block = 4 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 2816)
    assert above[24] - above[4] < 1.5 * block, f"20 more blocks of {block} bytes took {above[24] - above[4]} bytes"
