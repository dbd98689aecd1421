"""Ragged weights: a width per group means what it says, at every width it is read, next to a literal twin."""

import pytest
import torch

from polybit.core.affine import Grid, QWeight, device_gain, encode, scale_gain, storable_scale
from polybit.core.runtime import PolybitError

BITS_G = (4, 1, 8, 3)


def ragged(zero_kind: str, *, columns: int = 60, ratios=None, column_scale=None) -> QWeight:
    """A random ragged weight: four groups of 16 columns, the last one shorter."""
    generator = torch.Generator().manual_seed(1)
    bits_G = torch.tensor(BITS_G, dtype=torch.uint8)
    top_G = (1 << bits_G.long()) - 1
    scale_OG = storable_scale(torch.rand(6, 4, generator=generator) + 0.1)
    grid = Grid(8, 16, zero_kind, BITS_G)  # type: ignore[arg-type]
    fixed = grid.fixed_zero()
    drawn_OG = torch.rand(6, 4, generator=generator)
    zero = (drawn_OG * (top_G + 1)).floor() if fixed is None else torch.tensor(fixed)
    codes_OI = (torch.rand(6, 64, generator=generator) * (top_G + 1).repeat_interleave(16)).floor()[:, :columns]
    return QWeight(codes_OI.to(torch.uint8), scale_OG, zero, 8, 16, ratios or {}, column_scale, bits_G)


def literal(q: QWeight, widths: list[int]) -> torch.Tensor:
    """w = s (2^(B-b) r_b (p_b - c_b) + c_B - z), one weight at a time."""
    stored = [q.bits] * q.scale_OG.shape[1] if q.bits_G is None else q.bits_G.tolist()
    weight_OI = torch.empty(q.shape)
    for o in range(q.shape[0]):
        for i in range(q.shape[1]):
            g = i // q.group_size
            full, b = stored[g], min(widths[g], stored[g])
            middle = (2**full - 1) / 2
            offset = middle - float(q.zero[o, g]) if q.zero.ndim else (2**q.bits - 1) / 2 - float(q.zero)
            ratio = q.ratios.get(b, torch.ones(())) if b < full else torch.ones(())
            ratio = float(ratio[o, g] if ratio.ndim else ratio)
            prefix = int(q.codes_OI[o, i]) // 2 ** (full - b) - (2**b - 1) / 2
            value = float(q.scale_OG[o, g]) * (2 ** (full - b) * ratio * prefix + offset)
            weight_OI[o, i] = value * (1.0 if q.column_scale_I is None else float(q.column_scale_I[i]))
    return weight_OI


@pytest.mark.parametrize("zero_kind", ["centre", "level", "group"])
@pytest.mark.parametrize("width", [None, 1, 3, 5, 8])
def test_dequantize_is_the_formula(zero_kind, width):
    q = ragged(zero_kind, column_scale=torch.linspace(0.5, 2, 60))
    assert torch.allclose(q.dequantize(width), literal(q, [width or 8] * 4), rtol=1e-6, atol=1e-7)


def test_symmetric_stays_symmetric_at_every_width():
    weight_OI = ragged("centre").dequantize()
    mirrored = ragged("centre")
    codes_OI = torch.tensor([(1 << b) - 1 for b in BITS_G]).repeat_interleave(16)[:60] - mirrored.codes_OI
    flipped = QWeight(
        codes_OI.to(torch.uint8), mirrored.scale_OG, mirrored.zero, 8, 16, {}, None, mirrored.bits_G
    ).dequantize()
    assert torch.equal(weight_OI, -flipped)


def test_nested_codes_are_read_at_a_width_per_group():
    generator = torch.Generator().manual_seed(2)
    codes_OI = torch.randint(0, 256, (5, 48), generator=generator, dtype=torch.uint8)
    scale_OG = storable_scale(torch.rand(5, 3, generator=generator) + 0.1)
    ratios = {4: torch.tensor(0.9), 3: torch.rand(5, 3, generator=generator) + 0.5}
    q = QWeight(codes_OI, scale_OG, torch.tensor(127.5), 8, 16, ratios)
    assert torch.allclose(q.dequantize(torch.tensor([4, 3, 8])), literal(q, [4, 3, 8]), rtol=1e-6)
    assert torch.equal(q.dequantize(torch.tensor([4, 4, 4])), q.dequantize(4))
    assert torch.equal(q.dequantize(torch.tensor([0, -3, 12])), q.dequantize(torch.tensor([1, 1, 8])))


@pytest.mark.parametrize("zero_kind", ["centre", "level", "group"])
def test_encode_gives_the_codes_back(zero_kind):
    q = ragged(zero_kind)
    assert torch.equal(encode(q.dequantize(), q.scale_OG, q.zero, 8, 16, q.bits_G), q.codes_OI)
    far = encode(torch.full((6, 60), 1e4), q.scale_OG, q.zero, 8, 16, q.bits_G)
    assert far[0, ::16].tolist() == [(1 << b) - 1 for b in BITS_G]


def test_effective_bits_of_what_is_stored():
    q = ragged("group", columns=64)
    expected = sum(BITS_G) / 4 + (16 * 4 + sum(BITS_G)) / 64 + 8 * 4 / (6 * 64)
    assert q.bits_per_weight() == pytest.approx(expected)
    assert Grid(8, 16, "group", BITS_G).bits_per_weight(6, 64) == pytest.approx(expected)
    short = ragged("centre", columns=60)
    expected = (16 * (4 + 1 + 8) + 12 * 3) / 60 + 16 * 4 / 60 + 8 * 4 / 360
    assert short.bits_per_weight() == pytest.approx(expected)
    assert Grid(8, 16, "centre", BITS_G).bits_per_weight(6, 60) == pytest.approx(expected)


def test_equal_widths_are_a_plain_grid():
    assert Grid(8, 16).with_widths((4, 4)) == Grid(4, 16)
    assert Grid(4, 16).with_widths((3, 5)) == Grid(5, 16, "centre", (3, 5))


@pytest.mark.parametrize("bits_G", [(), (0, 4), (3, 3), (4, 9)])
def test_bad_group_widths(bits_G):
    with pytest.raises(PolybitError, match="group widths"):
        Grid(4, 16, "centre", bits_G)


def test_misfit_group_widths():
    with pytest.raises(PolybitError, match="give 3"):
        Grid(4, 16, "centre", (4, 3)).group_bits(48)
    q = ragged("centre")
    with pytest.raises(PolybitError, match="one per group"):
        QWeight(q.codes_OI, q.scale_OG, q.zero, 8, 16, {}, None, torch.tensor([8, 4]))


def test_the_short_way_to_dequantize_is_the_general_one():
    torch.manual_seed(2)
    codes, scale = torch.randint(0, 256, (6, 60), dtype=torch.uint8), torch.randn(6, 4) * 0.01
    ratios = {4: torch.rand(6, 4) + 0.5, 3: torch.tensor(0.9)}
    for zero in (torch.randint(0, 256, (6, 4)).float(), torch.tensor(127.5)):
        q = QWeight(codes, scale, zero, 8, 16, ratios, torch.rand(60))
        for width in (8, 6, 4, 3, 2):
            assert torch.equal(q.dequantize(width), q.dequantize(torch.full((4,), width))), width


def test_gain_on_the_device_is_the_gain():
    torch.manual_seed(3)
    powers = [2.0**e for e in (-149, -130, -126, -125, -24, -1, 0, 1, 24, 126, 127)]
    cases = [torch.zeros(3), torch.full((2,), torch.inf), *(torch.randn(5) * 10.0**e for e in range(-38, 38, 3))]
    for scale in [*cases, *(torch.tensor([p]) for p in powers), *(torch.tensor([p * 1.5]) for p in powers[:-1])]:
        assert float(device_gain(scale)) == scale_gain(scale), scale
