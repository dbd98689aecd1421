"""One record per model: copies have their own, converting clears what is out of date, no state dict knows of it."""

import copy

import pytest
from torch import nn

from polybit.core.records import Rotation
from polybit.core.runtime import PolybitError
from polybit.nn import switch
from polybit.nn.attention import use_operands
from polybit.nn.board import KEY, board_of, panel
from polybit.nn.convert import convert
from polybit.nn.layer import SwitchableLayer
from polybit.train.latent import latent_layers, make_trainable
from tests.families import quantized


def test_quantized_and_trainable_layers_are_switched_alike():
    model = quantized("llama")
    assert all(isinstance(layer, SwitchableLayer) for layer in panel(model).layers.values())
    plans = {"A": switch.Plan.uniform("w8"), "B": switch.Plan.uniform("w3a4")}
    trained = make_trainable(model, plans)
    assert panel(trained).layers == latent_layers(trained) and not switch.stored_layers(trained)
    assert all(isinstance(layer, SwitchableLayer) for layer in panel(trained).layers.values())
    with switch.at(trained, "B"):
        assert switch.current(trained) == plans["B"]
    assert switch.current(trained) == plans["A"]
    inside = switch.Plan(
        switch.Precision(w=4), columns={next(iter(latent_layers(trained))): switch.ColumnWidths(64, (0,))}
    )
    with pytest.raises(PolybitError, match="column"):
        switch.use(trained, inside)


def test_converting_clears_what_is_out_of_date():
    model = quantized("llama")
    board = panel(model)
    switch.set_presets(model, {"A": switch.Plan.uniform("w4")})
    use_operands(model, switch.Plan.uniform("w4k8v8"))
    board.rotation, board.worn = Rotation(3), "A"
    name, layer = next(iter(board.layers.items()))
    board.adapted = {name: layer, "other": layer}
    plain = nn.Linear(layer.columns, layer.rows, bias=False)
    parent, _, leaf = name.rpartition(".")
    planes = layer.planes
    setattr(model.get_submodule(parent), leaf, plain)
    convert(model, {name: planes})
    assert board_of(model) is board and not board.layers and not board.presets and set(board.adapted) == {"other"}
    assert board.rotation == Rotation(3) and board.operands
    assert panel(model).layers[name] is model.get_submodule(name) is not layer


def test_a_copy_has_a_board_of_its_own():
    model = switch.use(quantized("llama"), "w4")
    other = copy.deepcopy(model)
    assert board_of(other) is not board_of(model) and not [key for key in model.state_dict() if KEY in key]
    assert next(iter(panel(other).layers.values())) is other.get_submodule(next(iter(panel(model).layers)))
    switch.use(other, "w2")
    assert switch.current(model).default.w == 4


def test_a_float_model_has_nothing_to_switch():
    with pytest.raises(PolybitError, match="no quantized layer"):
        panel(nn.Linear(4, 4))
