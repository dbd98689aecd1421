"""BitOPs are those of the literature; a cost keeps its three names apart."""

import pytest

from polybit.core.cost import Cost, Work, bitops, bitops_of, drawn_bitops, relative_bitops, training_bitops
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError


def test_double_win_quants_table():
    """Table of the paper, GBitOPs: full precision 569.9 for PreActResNet18, and what random precision leaves of it."""
    macs = 569.9 / (32 * 32)
    assert bitops(macs, 32, 32) == pytest.approx(569.9)
    assert drawn_bitops(macs, range(4, 9)) == pytest.approx(21.2, abs=0.06)
    assert drawn_bitops(macs, range(4, 17)) == pytest.approx(63.5, abs=0.06)
    # WideResNet32 is given only at the two sets; both must come from one number of multiplications
    wide = 253.3 / (38 * 1.0)
    assert drawn_bitops(wide, range(4, 9)) == pytest.approx(253.3)
    assert drawn_bitops(wide, range(4, 17)) == pytest.approx(759.8, abs=0.3)
    # "-88.9 % BitOPs" of the ImageNet model
    assert 1 - drawn_bitops(1, range(4, 17)) / 1024 == pytest.approx(0.889, abs=1e-3)


def test_preact_resnet18_has_the_multiplications_the_table_says():
    """Counted layer by layer: 3x3 convolutions on 32, 16, 8 and 4 pixels, 1x1 shortcuts, a linear layer."""

    def conv(inputs, outputs, pixels, kernel=3):
        return inputs * outputs * kernel**2 * pixels**2

    macs = conv(3, 64, 32) + 4 * conv(64, 64, 32)
    for inputs, outputs, pixels in ((64, 128, 16), (128, 256, 8), (256, 512, 4)):
        macs += conv(inputs, outputs, pixels) + 3 * conv(outputs, outputs, pixels) + conv(inputs, outputs, pixels, 1)
    macs += 512 * 10
    assert bitops(macs, 32, 32) / 1e9 == pytest.approx(569.9, rel=3e-3)  # the table counts its norms too


def test_relative_bitops_of_three_presets():
    presets = {"w8a8": (8, 8), "w4a4": (4, 4), "w3a4": (3, 4)}
    assert [round(relative_bitops(w, a, base=8), 2) for w, a in presets.values()] == [1.0, 0.25, 0.19]


def test_cyclic_precision_saves_what_its_paper_says():
    """4 to 8 bits on a cosine against static 8: 31 %, 30.2 % in CPT's table."""
    import math

    cycle = [round(4 + 2 * (1 - math.cos(math.pi * t / 31))) for t in range(31)]
    assert [cycle.count(b) for b in range(4, 9)] == [8, 6, 4, 6, 7]
    saved = 1 - training_bitops(cycle, 8) / training_bitops([8] * 31, 8)
    assert saved == pytest.approx(0.302, abs=0.02)


def test_each_piece_of_work_has_its_own_operands():
    precision = Precision(w=4, a=8, k=8, v=4)
    work = [(Work("linear", 100), precision), (Work("scores", 10, "qk"), precision), (Work("mix", 10, "pv"), precision)]
    assert bitops_of(work) == 100 * 4 * 8 + 10 * 32 * 8 + 10 * 32 * 4
    assert bitops_of([(Work("linear", 100), Precision())]) == 100 * 32 * 32


def test_three_costs_never_share_a_name():
    cost = Cost("w4", 1e9, 4e6, 1e6, 512, (2.0, 1.9, 2.4))
    assert cost.bytes == 5e6
    assert cost.to_json() == {
        "bitops_per_token": 1e9,
        "bytes_per_token": {"weights": 4e6, "cache": 1e6, "context": 512},
        "ms_per_token": {"median": 2.0, "p10": 1.9, "p90": 2.4},
    }
    assert Cost("w4", 1, 1, 1, 1).to_json()["ms_per_token"] is None


def test_refusals():
    with pytest.raises(PolybitError, match="at least one width"):
        drawn_bitops(1, [])
    with pytest.raises(PolybitError, match="without a step"):
        training_bitops([])
