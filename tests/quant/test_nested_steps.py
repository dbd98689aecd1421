"""Learned rounding of nested codes: reference (QWeight.dequantize, a literal bound per weight), property (what a width
learns stays inside its bits, all narrow widths gain), determinism."""

from collections.abc import Mapping

import pytest
import torch

from polybit.core.affine import Grid, QWeight
from polybit.core.planes import pack, unpack
from polybit.quant.nested import nested
from polybit.quant.nested_steps import REACH, NestedBank, train_nested
from polybit.quant.rounding import Tuning
from tests.quant.test_rounding import block_loss, inputs, stats_of, toy

WIDTHS, TRAINED = (8, 4, 3, 2), (2, 3, 4)


def start_of(weight_OI, bits=8, widths=WIDTHS):
    return nested(weight_OI, stats_of(inputs(300, weight_OI.shape[1], 1)), Grid(bits, 16, "group"), widths=widths)


def moved(bank, by=0.3):
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for latent_NL in bank.latents.values():
            latent_NL += by * torch.randn(latent_NL.shape, generator=draw)
    bank.confine()
    return bank.harden()


@pytest.mark.parametrize("trained", [TRAINED, (2,), (3, 4), (4, 8)])
def test_values_are_those_of_the_stored_weight(trained):
    """Bit for bit what QWeight.dequantize gives, before and after training, and it packs; two layers at a time."""
    weights = toy()
    start = {name: start_of(w) for name, w in weights.items()}
    bank = NestedBank(start, weights, trained, inside=0.4)
    for b in trained:
        assert all(torch.equal(w, start[name].dequantize(b)) for name, w in bank.values(b).items())
    found = moved(bank)
    for name, q in found.items():
        assert not torch.equal(q.codes_OI, start[name].codes_OI)
        for b in trained:
            assert torch.equal(bank.values(b)[name], q.dequantize(b))
        assert torch.equal(unpack(pack(q)).codes_OI, q.codes_OI)


def test_an_untouched_bank_is_the_start():
    weights = toy()
    start = {name: start_of(w) for name, w in weights.items()}
    bank = NestedBank(start, weights, TRAINED, inside=0.4)
    bank.confine()
    assert all(torch.equal(q.codes_OI, start[name].codes_OI) for name, q in bank.harden().items())


def test_codes_go_no_further_than_they_may():
    """Of every weight and width: its own cell, that of the start, and those whose border is within reach."""
    weight_OI = toy()["up"]
    q = start_of(weight_OI)
    bank = NestedBank({"w": q}, {"w": weight_OI}, TRAINED, inside=0.4)
    moved(bank, by=20.0)
    scale, zero = (x.repeat_interleave(16, 1)[:, :40] for x in (q.scale_OG, q.zero))
    for b in TRAINED:
        ratio = (q.ratios[b] * torch.ones_like(q.scale_OG)).repeat_interleave(16, 1)[:, :40]
        stride, middle = 2 ** (8 - b), (2**b - 1) / 2
        at = ((weight_OI / scale + zero - 127.5) / (stride * ratio) + middle + 0.5).double()
        codes = bank.matrix(bank.latents[b].detach().floor(), "w")
        for row in range(44):
            for column in range(40):
                here, own = float(at[row, column]), int(q.codes_OI[row, column]) >> (8 - b)
                reached = {own} | {c for c in range(2**b) if c - REACH * 2**b <= here < c + 1 + REACH * 2**b}
                ends = {0} if here < 0 else {2**b - 1} if here >= 2**b else set()
                allowed = range(min(reached | ends), max(reached | ends) + 1)
                assert int(codes[row, column]) in allowed, (b, row, column)


def test_a_width_keeps_what_narrower_ones_read():
    """Latent weights of 4 bits alone move: 2 and 3 bits read the same codes as before."""
    weight_OI = toy()["up"]
    q = start_of(weight_OI)
    bank = NestedBank({"w": q}, {"w": weight_OI}, TRAINED, inside=0.4)
    with torch.no_grad():
        bank.latents[4] += 3.0
    bank.confine()
    found = bank.harden()["w"]
    assert not torch.equal(found.codes_OI >> 4, q.codes_OI >> 4)
    assert torch.equal(found.codes_OI >> 5, q.codes_OI >> 5)


def learned(steps=120, seed=0, reach=REACH):
    weights, seen = toy(), inputs(600, 40, 1)
    hidden = torch.tanh(seen @ weights["up"].T)
    grid = Grid(8, 16, "group")
    start = {n: nested(weights[n], stats_of(x), grid, widths=WIDTHS) for n, x in (("up", seen), ("down", hidden))}
    loss = block_loss(weights, seen, 1)
    tuning = Tuning(steps=steps, lr=0.01, inside=0.4, seed=seed)
    trained = train_nested(start, weights, lambda v, n: loss(v(TRAINED[n % 3]), 0), TRAINED, tuning)
    return weights, start, trained(reach)


def losses(weights: Mapping[str, torch.Tensor], codes: Mapping[str, QWeight]) -> dict[int, float]:
    """Of every width, on inputs that were not seen."""
    loss = block_loss(weights, inputs(600, 40, 2), 1)
    return {b: float(loss({n: q.dequantize(b) for n, q in codes.items()}, 0)) for b in WIDTHS}


def test_narrow_widths_of_one_code_gain_together():
    weights, start, trained = learned()
    before, after = losses(weights, start), losses(weights, trained)
    assert all(after[b] < 0.9 * before[b] for b in TRAINED), (before, after)
    assert after[8] < 0.2 * before[4]  # what 8 bits lost is little
    for name, q in trained.items():
        assert torch.equal(q.scale_OG, start[name].scale_OG) and torch.equal(q.zero, start[name].zero)


def test_same_steps_same_bits():
    one, same = learned(steps=12)[2], learned(steps=12)[2]
    assert all(torch.equal(one[n].codes_OI, same[n].codes_OI) for n in one)


def test_stored_widths_and_groups_of_all_lengths_are_trained_together():
    weights = toy()
    start = {"up": start_of(weights["up"]), "down": start_of(weights["down"], 4, (4, 2))}
    targets = {b: {n: q.dequantize(min(b, q.bits)) for n, q in start.items()} for b in (2, 4)}

    def objective(values, step):
        b = (2, 4)[step % 2]
        found = values(b)
        assert step > 1 or all(torch.equal(found[n], w) for n, w in targets[b].items())
        return sum((found[n] - weights[n]).square().sum() for n in weights)

    trained = train_nested(start, weights, objective, (2, 4), Tuning(steps=4, lr=0.05, inside=0.4))(REACH)
    assert {n: q.bits for n, q in trained.items()} == {"up": 8, "down": 4}


def test_a_smaller_reach_costs_8_bits_less():
    """Codes beyond it stay at its border."""
    weights, start, far = learned()
    near = learned(reach=REACH / 3)[2]
    lost = [losses(weights, codes)[8] for codes in (far, near, start)]
    assert lost[0] > lost[1] > lost[2]
