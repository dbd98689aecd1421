"""Layers whose groups are stored or read at several widths, and layers with an adapter, against a dense product."""

import copy

import pytest
import torch
from torch.nn.functional import linear as dense

from polybit.core.affine import fake_quantize_tokens
from polybit.core.plan import ColumnWidths, Plan
from polybit.core.planes import pack, unpack
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.nn.fields import Fields, tensors_of
from polybit.nn.linear import QuantEmbedding, QuantLinear, gather_rows, slice_rows
from polybit.nn.switch import at, current, random_precision, use
from tests.families import prompt, quantized, rtn, some_widths

SHAPES = [(16, 64), (17, 97), (40, 72), (72, 136)]


def stored(rows, columns, group_size=32, zero="group", ragged=True):
    own = some_widths(columns, group_size) if ragged else None
    return pack(rtn(torch.randn(rows, columns), 8, group_size, zero, own))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero", ["group", "fixed"])
@pytest.mark.parametrize("arithmetic", ["float", "int8", "int16"])
def test_linear_equals_the_dense_product(shape, zero, arithmetic):
    planes = stored(*shape, zero=zero)
    layer, x = QuantLinear.of(planes, torch.nn.Parameter(torch.randn(shape[0]))), torch.randn(2, 3, shape[1])
    layer.arithmetic = arithmetic
    close = {"float": 1e-5, "int8": 3e-2, "int16": 1e-4}[arithmetic]
    for width in range(2, 9):
        layer.precision = Precision(w=width)
        expected = dense(x, unpack(planes).dequantize(width), layer.bias)
        assert (layer(x) - expected).abs().max() <= close * expected.abs().max()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("arithmetic", ["float", "int16"])
@pytest.mark.parametrize("keep", [False, True])
def test_column_offsets(ragged, arithmetic, keep):
    planes = stored(40, 200, ragged=ragged)
    layer, x = QuantLinear.of(planes), torch.randn(3, 200)
    layer.arithmetic, layer.keep = arithmetic, keep
    for width, offsets in ((4, (0, 1, -1, 2)), (2, (-4, 0, 4, 0)), (8, (0, 1, -1, 2)), (4, (0, 0, 0, 0))):
        layer.precision, layer.offsets = Precision(w=width), ColumnWidths(64, offsets)
        widths = [w for w in offsets for _ in range(2)][:7]
        read = torch.tensor([max(1, width + v) for v in widths])
        expected = dense(x, unpack(planes).dequantize(read))
        assert (layer(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(layer.decode(), unpack(planes).dequantize(read))
    layer.offsets = ColumnWidths(48, (0,) * 5)
    with pytest.raises(PolybitError, match="fit groups"):
        layer(x)


@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_and_sliced_rows(shape):
    for zero in ("group", "fixed"):
        planes = stored(*shape, zero=zero)
        ids = torch.randint(0, shape[0], (11,))
        part, skipped = slice_rows(planes, 3, shape[0])
        for width in range(1, 9):
            whole = unpack(planes).dequantize(width)
            assert torch.equal(gather_rows(planes, ids, width).dequantize(width), whole[ids])
            assert torch.equal(unpack(part).dequantize(width)[skipped:], whole[3:])


def test_embedding_reads_column_offsets():
    planes = stored(40, 96)
    layer = QuantEmbedding(Fields.of(planes), tensors_of(planes), torch.zeros(1))
    layer.precision, layer.offsets = Precision(w=4), ColumnWidths(32, (1, 0, -2))
    ids = torch.tensor([[0, 39], [7, 7]])
    assert torch.equal(layer(ids), unpack(planes).dequantize(torch.tensor([5, 4, 2]))[ids])


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt2"])
def test_whole_models(family):
    """Every kind of layer, ragged: the logits are those of the decoded weights."""
    model = quantized(family, include_embeddings=True, ragged=True)
    for precision in ("float", "w4"):
        use(model, precision)
        with torch.no_grad():
            logits = model(prompt()).logits
            for layer in model.modules():
                if hasattr(layer, "keep"):
                    layer.keep = True
            kept = model(prompt()).logits
            for layer in model.modules():
                if hasattr(layer, "keep"):
                    layer.keep, layer.kept = False, None
        assert torch.allclose(logits, kept, atol=1e-3, rtol=1e-3)


def test_fields_and_tensors_rebuild_the_planes():
    planes = stored(33, 100)
    fields = Fields.of(planes)
    assert fields.to_json()["group_bits"] == "8747"
    assert Fields.from_json("x", fields.to_json()) == fields
    tensors = tensors_of(planes)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == fields.tensors()
    assert torch.equal(unpack(fields.planes(tensors)).dequantize(5), unpack(planes).dequantize(5))
    assert "group_bits" not in Fields.of(stored(33, 100, ragged=False)).to_json()


def test_switching_brings_the_columns():
    model = quantized("llama")
    name, layer = next(
        (n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.fields.group_size == 32
    )
    offsets = ColumnWidths(32, tuple(range(-1, layer.fields.groups - 1)))
    plan = Plan(Precision(w=4), {}, {name: offsets})
    use(model, plan)
    assert current(model) == plan
    assert layer.reading == tuple(min(4 + v, 8) for v in offsets.offsets)
    with at(model, "w3"):
        assert layer.reading == 3
    assert current(model) == plan
    with random_precision(model, ["w8", plan], seed=1):
        seen = set()
        for _ in range(12):
            model(prompt())
            seen.add(layer.reading)
        assert seen == {8, tuple(min(4 + v, 8) for v in offsets.offsets)}
    use(model, "w5")
    assert layer.reading == 5
    for wrong in (ColumnWidths(32, (0,)), ColumnWidths(16, (0,) * 99)):
        with pytest.raises(PolybitError, match=name):
            use(model, Plan(Precision(w=4), {}, {name: wrong}))
    assert layer.reading == 5
    with pytest.raises(PolybitError, match="does not have"):
        use(model, Plan(Precision(w=4), {}, {"model.norm": offsets}))


def random_factors(layer, rank=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, layer.columns, generator=draw) / 9, torch.randn(layer.rows, rank, generator=draw)


@pytest.mark.parametrize("arithmetic", ["float", "int8", "int16"])
@pytest.mark.parametrize("a", [16, 8])
def test_adapter_of_a_preset(arithmetic, a):
    """Every way to multiply adds scale * up (down x) of the input as it came."""
    layer, x = QuantLinear.of(stored(40, 96, ragged=False), torch.nn.Parameter(torch.randn(40))), torch.randn(2, 3, 96)
    layer.arithmetic, layer.precision = arithmetic, Precision(w=4, a=a)
    plain = layer(x)
    down, up = random_factors(layer)
    layer.set_adapter("chat", down, up, 0.5)
    assert torch.equal(layer(x), plain)
    layer.wear("chat")
    expected = plain + 0.5 * x @ down.T @ up.T
    assert (layer(x) - expected).abs().max() <= 1e-3 * expected.abs().max()
    layer.keep = True
    rounded = x if a == 16 else fake_quantize_tokens(x, a)
    expected = dense(rounded, layer.decode(), layer.bias) + 0.5 * x @ down.T @ up.T
    assert torch.allclose(layer(x), expected, atol=1e-4)
    layer.keep = False
    layer.wear("other")
    assert torch.equal(layer(x), plain)
    assert set(layer.state_dict()) == {"bias", *tensors_of(layer.planes)}
    copied = copy.deepcopy(layer)
    copied.wear("chat")
    assert torch.allclose(copied(x), plain + 0.5 * x @ down.T @ up.T, atol=0.05)


def test_adapter_can_be_trained():
    layer, x = QuantLinear.of(stored(40, 96, ragged=False)), torch.randn(3, 96)
    layer.arithmetic = "int16"
    down, up = (torch.nn.Parameter(factor) for factor in random_factors(layer))
    layer.set_adapter("chat", down, up)
    layer.wear("chat")
    layer(x).sum().backward()
    assert torch.allclose(up.grad, (x @ down.T).sum(0).expand(40, -1), atol=1e-4)


def test_adapter_of_another_shape_is_refused():
    layer = QuantLinear.of(stored(40, 96))
    with pytest.raises(PolybitError, match="shape"):
        layer.set_adapter("chat", torch.randn(4, 95), torch.randn(40, 4))
    with pytest.raises(PolybitError, match="shapes"):
        layer.set_adapter("chat", torch.randn(4, 96), torch.randn(40, 5))
