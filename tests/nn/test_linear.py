"""Reference: the quantized layers against dequantize and a dense product, over odd shapes, widths and options."""

import copy

import pytest
import torch
from torch.nn.functional import linear as dense

from polybit.core.affine import fake_quantize_tokens
from polybit.core.planes import pack, unpack
from polybit.core.precision import Precision
from polybit.nn.fields import Fields, tensors_of
from polybit.nn.linear import QuantEmbedding, QuantLinear, QuantWeight, gather_rows, slice_rows
from tests.families import rtn

SHAPES = [(1, 5), (16, 32), (17, 33), (40, 72), (72, 136)]


def stored(rows, columns, bits=8, group_size=32, zero="group"):
    return pack(rtn(torch.randn(rows, columns), bits, group_size, zero))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group_size", "zero"), [(8, 32, "group"), (4, 0, "fixed"), (5, 64, "group")])
def test_linear_equals_the_dense_product(shape, bits, group_size, zero):
    planes = stored(*shape, bits, group_size, zero)
    bias = torch.nn.Parameter(torch.randn(shape[0]))
    layer = QuantLinear.of(planes, bias)
    x = torch.randn(2, 3, shape[1])
    for width in range(2, bits + 1):
        layer.precision = Precision(w=width)
        assert torch.allclose(layer(x), dense(x, unpack(planes).dequantize(width), bias), atol=1e-5)


def test_float_precision_reads_all_stored_bits():
    layer = QuantLinear.of(stored(8, 16, 5))
    assert layer.width == 5
    layer.precision = Precision(w=3)
    assert layer.width == 3


def test_activations_are_rounded_per_token():
    planes = stored(16, 32)
    layer = QuantLinear.of(planes)
    layer.precision = Precision(w=8, a=4)
    x = torch.randn(5, 32)
    expected = dense(fake_quantize_tokens(x, 4), unpack(planes).dequantize(8))
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert not torch.allclose(layer(x), dense(x, unpack(planes).dequantize(8)), atol=1e-3)


def test_kept_weight_gives_the_same_and_follows_the_width():
    layer = QuantLinear.of(stored(16, 32))
    x = torch.randn(2, 32)
    plain = layer(x)
    layer.keep = True
    assert torch.allclose(layer(x), plain, atol=1e-5) and layer.kept[0] == 8
    layer.precision = Precision(w=3)
    kept = layer(x)
    layer.keep = False
    assert torch.allclose(kept, layer(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_leaves_the_stored_weight_exact(dtype):
    planes = stored(24, 40)
    layer = QuantLinear.of(planes, torch.nn.Parameter(torch.zeros(24)))
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    for name, tensor in tensors_of(planes).items():
        assert torch.equal(getattr(layer, name), tensor), name
    assert torch.equal(layer.decode(), unpack(planes).dequantize())
    assert layer(torch.randn(2, 40, dtype=dtype)).dtype == dtype


def test_the_stored_weight_is_shared_not_copied():
    planes = stored(16, 32)
    layer = QuantLinear.of(planes)
    assert layer.planes.planes.data_ptr() == planes.planes.data_ptr()
    assert layer.planes.scale.data_ptr() == planes.scale.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "group_size", "zero"), [(8, 16, "group"), (4, 0, "fixed")])
def test_gathered_rows_equal_rows_of_the_whole_matrix(shape, bits, group_size, zero):
    planes = stored(*shape, bits, group_size, zero)
    ids = torch.randint(0, shape[0], (11,))
    for width in range(1, bits + 1):
        whole = unpack(planes).dequantize(width)[ids]
        assert torch.equal(gather_rows(planes, ids, width).dequantize(width), whole)


def test_embedding_gives_rows_in_the_models_type():
    planes = stored(40, 24)
    layer = QuantEmbedding(Fields.of(planes), tensors_of(planes), torch.zeros(1))
    ids = torch.tensor([[0, 39], [7, 7]])
    expected = unpack(planes).dequantize()[ids]
    assert torch.equal(layer(ids), expected)
    layer.keep = True
    assert torch.equal(layer(ids), expected)
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert set(layer.state_dict()) == set(tensors_of(planes))


@pytest.mark.parametrize(("rows", "start", "stop"), [(64, 16, 32), (60, 20, 40), (50, 0, 50), (45, 36, 45)])
def test_sliced_rows_equal_rows_of_the_whole_matrix(rows, start, stop):
    planes = stored(rows, 40)
    part, skipped = slice_rows(planes, start, stop)
    for width in (8, 7, 6, 2):
        found = unpack(part).dequantize(width)[skipped : skipped + stop - start]
        assert torch.equal(found, unpack(planes).dequantize(width)[start:stop])


def test_fields_and_tensors_rebuild_the_planes():
    planes = stored(33, 70, 6, 16)
    fields = Fields.of(planes)
    again = Fields.from_json("x", fields.to_json())
    assert again == fields
    tensors = tensors_of(planes)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == fields.tensors()
    assert torch.equal(unpack(fields.planes(tensors)).dequantize(5), unpack(planes).dequantize(5))


def test_empty_layer_takes_a_state_dict():
    full = QuantWeight.of(stored(20, 40))
    empty = QuantWeight(full.fields)
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty.decode(), full.decode())


def test_copies_are_independent():
    layer = QuantLinear.of(stored(16, 32))
    other = copy.deepcopy(layer)
    other.precision = Precision(w=2)
    assert layer.width == 8 and other.width == 2
