"""Every quantizer of the table keeps the contract: (weight [O, I], statistics, grid) -> QWeight, pure and sane."""

import dataclasses
import inspect
from itertools import pairwise

import pytest
import torch

from polybit.core.affine import Grid, group_lengths, storable_scale
from polybit.core.parts import load
from polybit.core.planes import pack, unpack
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.quant.problem import layer_loss
from polybit.quant.rtn import rtn
from polybit.quant.table import FIXED, LAYERWISE, NESTED, QUANTIZERS
from tests.quant.inputs import layer, stats

WIDTHS = (8, 4, 3, 2)  # of nested codes
ZEROS = ("centre", "group")
SIZES = (0, 16, 64)  # groups; 72 columns end with a short one


def quantize(name, weight_OI, seen, grid):
    """Codes by the method of that name; nested ones at all of WIDTHS that fit the grid."""
    part = QUANTIZERS[name]
    widths = {"widths": tuple(b for b in WIDTHS if b <= grid.bits)} if part.nested else {}
    return part(weight_OI, seen if part.needs_stats else None, grid, **widths)


def harms(name, weight_OI, seen, size, zero="group"):
    """Layer loss by width, narrowest first: of files of one width each, or of one nested file."""
    if QUANTIZERS[name].nested:
        q = quantize(name, weight_OI, seen, Grid(max(WIDTHS), size, zero))
        return {b: layer_loss(weight_OI, q, seen, b) for b in sorted(WIDTHS)}
    return {b: layer_loss(weight_OI, quantize(name, weight_OI, seen, Grid(b, size, zero)), seen) for b in (2, 3, 4, 8)}


@pytest.fixture(params=QUANTIZERS)
def name(request):
    return request.param


def test_the_line_is_true(name):
    part = QUANTIZERS[name]
    function = load(part.function)
    first = list(inspect.signature(function).parameters.values())[:3]
    assert [p.name for p in first] == ["weight_OI", "stats", "grid"]
    assert ("widths" in inspect.signature(function).parameters) == part.nested
    assert part.summary[0].islower() and not part.summary.endswith(".")
    assert inspect.getdoc(function)
    assert part.start is None or part.start in LAYERWISE, "learned codes start from those of a layer-wise method"
    assert (name in NESTED) != (name in FIXED)
    if part.learned:
        assert part.learned.steps > 0 <= part.learned.block_steps


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("size", SIZES)
def test_codes_scales_and_zero_points_can_be_stored(name, size, zero):
    weight_OI, seen = layer(6, 72)
    for bits in (3, 8) if not QUANTIZERS[name].nested else (4, 8):
        grid = Grid(bits, size, zero)
        q = quantize(name, weight_OI, seen, grid)
        groups = len(group_lengths(72, size))
        assert (q.bits, q.group_size, q.shape) == (bits, size, (6, 72))
        assert q.codes_OI.dtype == torch.uint8 and int(q.codes_OI.max()) < 2**bits
        assert q.scale_OG.dtype == torch.float32 and q.scale_OG.shape == (6, groups)
        assert torch.equal(q.scale_OG, storable_scale(q.scale_OG))
        if zero == "group":
            assert q.zero.shape == q.scale_OG.shape
            assert torch.equal(q.zero, q.zero.round().clamp(0, 2**bits - 1)), "a zero point is a code"
        else:
            assert not q.zero.ndim and float(q.zero) == grid.fixed_zero()
        stored = unpack(pack(q))
        for width in [b for b in WIDTHS if b <= bits] if QUANTIZERS[name].nested else [bits]:
            assert torch.equal(stored.dequantize(width), q.dequantize(width))


def test_nothing_is_touched_and_the_same_comes_twice(name):
    weight_OI, seen = layer(9, 72)
    kept = weight_OI.clone(), seen.hessian_II.clone(), seen.absmean_I.clone()
    grid = Grid(4, 32, "group")
    first = quantize(name, weight_OI, seen, grid)
    torch.rand(3)  # the global generator plays no part
    second = quantize(name, weight_OI, seen, grid)
    assert all(map(torch.equal, kept, (weight_OI, seen.hessian_II, seen.absmean_I)))
    for field in dataclasses.fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else repr(one) == repr(two), field.name
    assert first.codes_OI.data_ptr() != second.codes_OI.data_ptr()


@pytest.mark.parametrize("size", [16, 64])
def test_no_worse_than_rounding_to_nearest(name, size):
    """At every width on correlated inputs. Nested codes are held against rounding whose leading bits are read, but for
    the widest, which pays for the others. A method without statistics may weigh errors otherwise: it is within a sixth
    (hqq forgives outliers, and a Gaussian weight has none)."""
    weight_OI, seen = layer(32, 136)
    part = QUANTIZERS[name]
    found = harms(name, weight_OI, seen, size)
    for bits, harm in found.items():
        if part.nested:
            plain = layer_loss(weight_OI, rtn(weight_OI, None, Grid(8, size, "group")), seen, bits)
            assert bits == max(found) or harm <= plain, (bits, harm, plain)
        else:
            plain = layer_loss(weight_OI, rtn(weight_OI, None, Grid(bits, size, "group"), search=False), seen)
            assert harm <= plain * (1 if part.needs_stats else 7 / 6), (bits, harm, plain)


@pytest.mark.parametrize(("size", "zero"), [(0, "centre"), (16, "group")])
def test_more_bits_are_never_worse(name, size, zero):
    weight_OI, seen = layer(16, 72)
    found = list(harms(name, weight_OI, seen, size, zero).values())
    assert all(wide <= narrow for narrow, wide in pairwise(found)), found


def extremes():
    """Name -> (weight, statistics) of inputs that are legal and strange."""
    weight_OI, seen = layer(5, 45)
    dead = LayerStats(seen.hessian_II.clone(), seen.absmean_I.clone(), 9)
    dead.hessian_II[5], dead.hessian_II[:, 5], dead.absmean_I[5] = 0, 0, 0
    rows = weight_OI.clone()
    rows[2], rows[3] = 0.0, 1.5
    return {
        "all zero": (torch.zeros(4, 45), seen),
        "zero and constant rows": (rows, seen),
        "huge": (weight_OI * 1e30, seen),
        "tiny": (weight_OI * 1e-30, seen),
        "sizes far apart": (weight_OI * torch.logspace(-30, 30, 5)[:, None], seen),
        "one row": (weight_OI[:1], seen),
        "one column": (weight_OI[:, :1], LayerStats(torch.ones(1, 1), torch.ones(1), 3)),
        "half precision": (weight_OI.bfloat16(), seen),
        "dead input": (weight_OI, dead),
        "never excited": (weight_OI, LayerStats(torch.zeros(45, 45), torch.zeros(45), 9)),
        "one token": (weight_OI, stats(torch.randn(1, 45, generator=torch.Generator().manual_seed(1)))),
        "no statistics": (weight_OI, None),
        "huge inputs": (weight_OI, LayerStats(seen.hessian_II * 1e30, seen.absmean_I * 1e15, 9)),
    }


@pytest.mark.parametrize("what", extremes())
def test_extreme_inputs_stay_sane(name, what):
    """Finite, storable, and no worse than answering zero."""
    weight_OI, seen = extremes()[what]
    for grid in (Grid(4, 32, "group"), Grid(8, 0, "centre")):
        q = quantize(name, weight_OI, seen, grid)
        assert torch.isfinite(q.dequantize()).all()
        assert torch.equal(unpack(pack(q)).dequantize(), q.dequantize())
        size = weight_OI.double().square().sum()
        assert (q.dequantize().double() - weight_OI.double()).square().sum() <= size * 1.5 + 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name, bad):
    weight_OI, seen = layer(3, 40)
    weight_OI[1, 2] = bad
    with pytest.raises(PolybitError, match="1 NaN or infinite"):
        quantize(name, weight_OI, seen, Grid(4, 16, "group"))


def test_statistics_of_another_layer_are_refused(name):
    part = QUANTIZERS[name]
    weight_OI, seen = layer(3, 40)
    if not part.needs_stats:
        return
    with pytest.raises(PolybitError, match="for 40 input columns but the weight has 39"):
        quantize(name, weight_OI[:, :39], seen, Grid(4, 16, "group"))
    broken = LayerStats(seen.hessian_II.clone(), seen.absmean_I, seen.tokens)
    broken.hessian_II[3, 3] = float("inf")
    with pytest.raises(PolybitError, match="statistics hold NaN or infinite"):
        quantize(name, weight_OI, broken, Grid(4, 16, "group"))


def test_a_width_per_group_is_kept_or_refused(name):
    """Plans of columns ask for it: fixed methods store it, nested codes are narrowed when they are read."""
    weight_OI, seen = layer(6, 80)
    ragged = Grid(4, 32, "group").with_widths((4, 2, 3))
    if QUANTIZERS[name].nested:
        with pytest.raises(PolybitError, match="without column widths"):
            quantize(name, weight_OI, seen, ragged)
        return
    q = quantize(name, weight_OI, seen, ragged)
    assert q.stored_widths().tolist() == [4, 2, 3]
    assert int(q.codes_OI[:, 32:64].max()) < 4 and int(q.codes_OI[:, 64:].max()) < 8
    assert torch.equal(unpack(pack(q)).dequantize(), q.dequantize())
    narrow, wide = (quantize(name, weight_OI, seen, Grid(b, 32, "group")) for b in (2, 4))
    losses = [layer_loss(weight_OI, codes, seen) for codes in (wide, q, narrow)]
    assert losses == sorted(losses)
