"""The one loop: what it yields is what lies in the model afterwards, what is finished is not made again, and what a
recipe does not ask for is not done."""

import pytest
import torch

from polybit.compress import refine
from polybit.compress.blocks import Whole, outside
from polybit.compress.loop import FINISH, OUTSIDE, Nowhere, compress, compress_in_place, quantize_layer
from polybit.compress.recipe import Recipe, choose, within_memory
from polybit.compress.refine import Teacher
from polybit.core import runtime
from polybit.core.affine import Grid
from polybit.core.plan import PLAN, Plan
from polybit.core.planes import unpack
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.hub.workspace import Workspace
from polybit.nn.convert import targets
from polybit.nn.switch import panel
from polybit.quant import steps
from polybit.quant.table import DEFAULT_FIXED, DEFAULT_NESTED, FIXED, NESTED, QUANTIZERS
from tests.families import tiny_model

WIDTHS = (4, 2)
TEXTLESS = [name for name in FIXED if not QUANTIZERS[name].needs_stats]


def text():
    """Two batches of two windows."""
    return list(torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(1)).split(2))


def recipe_of(name, **more):
    widths = WIDTHS if QUANTIZERS[name].nested else (3,)
    return Recipe(name, Grid(max(widths), 16, QUANTIZERS[name].zero), widths, **more)


class Shelf(dict):
    """A store in memory."""

    def read(self, block):
        return self.get(block)

    def write(self, block, weights):
        self[block] = dict(weights)

    def state(self, block):
        return None


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n].dequantize(), other[n].dequantize()) for n in one)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_yielded_is_what_is_stored(name):
    model, kept = tiny_model("llama"), tiny_model("llama")
    every = targets(model, include_embeddings=True)
    recipe = recipe_of(name, finish_steps=2 if QUANTIZERS[name].learned else 0)
    parts = list(compress(kept, every, text(), recipe))
    codes = {key: q for part in parts for key, q in part.items()}
    assert codes.keys() == {target.name for target in every}
    assert (len(parts) == 1) == bool(recipe.finish_steps)
    errors = compress_in_place(model, every, text(), recipe, Nowhere())
    assert {key: list(row) for key, row in errors.items()} == {key: [f"w{b}" for b in recipe.widths] for key in codes}
    layers = panel(model).layers
    assert all(torch.equal(unpack(layers[key].planes).dequantize(), q.dequantize()) for key, q in codes.items())


@pytest.mark.parametrize("name", [DEFAULT_FIXED, DEFAULT_NESTED])
def test_what_is_finished_is_not_made_again(name, monkeypatch):
    recipe, shelf = recipe_of(name, finish_steps=2), Shelf()
    every = targets(tiny_model("llama"), include_embeddings=True)
    (first,) = compress(tiny_model("llama"), every, text(), recipe, shelf)
    assert len(shelf) == 4 and {OUTSIDE, FINISH} < shelf.keys(), "two blocks, the rest and the finish"
    monkeypatch.setattr("polybit.compress.loop.quantize_layer", None)
    (again,) = compress(tiny_model("llama"), every, text(), recipe, shelf)
    assert equal(first, again)


@pytest.mark.parametrize("name", [DEFAULT_FIXED, DEFAULT_NESTED])
def test_learned_rounding_that_was_ended_goes_on_to_the_same_bits(name, tmp_path, monkeypatch, capsys):
    """Ended after three of six steps, by what cannot be caught; two steps were kept, and four are made."""
    monkeypatch.setattr(steps, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(runtime, "LINE_EVERY", -1.0)
    recipe, every, made = recipe_of(name, finish_steps=6), targets(tiny_model("llama")), []
    (straight,) = compress(tiny_model("llama"), every, text(), recipe)
    said = capsys.readouterr().err
    assert "polybit: quantizing, before learned rounding: 1 of 2" in said
    assert "polybit: learned rounding: 1 of 16" in said
    original = Teacher.distance

    def counted(teacher, weights, index):
        made.append(index)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(teacher, weights, index)

    monkeypatch.setattr(Teacher, "distance", counted)
    store = Workspace(tmp_path / "out", {})
    with pytest.raises(KeyboardInterrupt):
        list(compress(tiny_model("llama"), every, text(), recipe, store))
    store.close()
    store = Workspace(tmp_path / "out", {})
    (resumed,) = compress(tiny_model("llama"), every, text(), recipe, store)
    assert equal(straight, resumed) and len(made) == 3 + 4
    assert store.state(FINISH).read() is None, "a finished run keeps no state"
    store.discard()


def test_the_teacher_says_what_the_float_model_says(monkeypatch):
    """From hidden states that were kept, and from those that had no room."""
    model, batches = tiny_model("llama"), text()
    whole = Whole(model, tuple(targets(model)))
    teachers = [Teacher(whole, batches)]
    monkeypatch.setattr(refine, "TEACHER_BYTES", 0)
    teachers.append(Teacher(whole, batches))
    for teacher in teachers:
        for index, ids_BT in enumerate(batches):
            for _ in range(2):
                wanted_BTV = model(input_ids=ids_BT).logits[:, :-1].float().softmax(-1)
                probability_BTV, negative_entropy = teacher.answer(index)
                torch.testing.assert_close(probability_BTV, wanted_BTV)
                torch.testing.assert_close(negative_entropy, (wanted_BTV * wanted_BTV.log()).sum(-1).mean())
                assert teacher.divergence({}, index).item() == pytest.approx(0, abs=1e-6)
    assert [len(teacher.kept) for teacher in teachers] == [2, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_that_are_kept_change_nothing(family, monkeypatch):
    """Settled layers repeat what they gave: the same bits as running them again, all, some or none of them."""
    found = []
    for room in (0, 20_000, 1 << 28):
        monkeypatch.setattr("polybit.compress.settled.ROOM", room)
        model = tiny_model(family)
        every = targets(model)
        forwards = [type(model.get_submodule(t.module_name)).forward for t in every]
        found.append(
            {name: q for part in compress(model, every, text(), recipe_of("gptq")) for name, q in part.items()}
        )
        assert forwards == [model.get_submodule(t.module_name).forward.__func__ for t in every], "all put back"
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])


@pytest.mark.parametrize("name", TEXTLESS)
def test_a_method_without_statistics_runs_no_model(name, monkeypatch):
    model = tiny_model("llama")
    every = targets(model, include_embeddings=True)
    monkeypatch.setattr(type(model), "forward", None)
    recipe = recipe_of(name)
    assert not recipe.reads_text
    codes = {key: q for part in compress(model, every, (), recipe) for key, q in part.items()}
    rest = {target.name for target in outside(model, every)}
    for target in every:
        method = recipe_of("rtn") if target.name in rest else recipe
        wanted = quantize_layer(target.weight_OI(model), None, method, recipe.grid)
        assert torch.equal(codes[target.name].dequantize(), wanted.dequantize())


def test_a_method_with_statistics_wants_text():
    model = tiny_model("llama")
    with pytest.raises(PolybitError, match="0 batches"):
        list(compress(model, targets(model), (), recipe_of("gptq")))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_recipe_follows_the_line_of_its_method(name):
    part = QUANTIZERS[name]
    widths = WIDTHS if part.nested else (3,)
    for effort in ("fast", "normal", "best"):
        recipe = choose(name, widths, 32, effort=effort)
        learns = part.learned and (effort == "best" or effort == part.learned.effort)
        assert recipe.finish_steps == (part.learned.steps if learns else 0)
        assert (recipe.grid.zero, recipe.is_nested, recipe.grid.bits) == (part.zero, part.nested, max(widths))
        crowded = within_memory(recipe, 1 << 50)
        assert not crowded.finish_steps and crowded.block_steps == (part.learned.block_steps if learns else 0)
        assert within_memory(recipe, 1) == recipe
    assert choose(name, widths, 32, asymmetric=False).grid.zero == "centre"
    assert choose(name, widths, 32, asymmetric=True).grid.zero == "group"


def test_plans_say_widths_and_presets():
    plan = Plan(Precision(w=3), {"a": Precision(w=5)})
    fixed = choose("gptq", None, 32, plan=plan)
    assert (fixed.widths, fixed.presets, fixed.grid_of("a", 64).bits, fixed.grid_of("b", 64).bits) == (
        (5,),
        [PLAN],
        5,
        3,
    )
    nested = choose(NESTED[0], (8, 4), 32, plan=plan)
    assert nested.presets == ["w8", "w4", PLAN] and nested.grid_of("b", 64).bits == 8
    with pytest.raises(PolybitError, match="method gptq makes a file of one width"):
        Recipe("gptq", Grid(8), (8, 4))
    with pytest.raises(PolybitError, match="'magic' is not known: choose nested, rounding"):
        choose("magic", (4,), 64)
