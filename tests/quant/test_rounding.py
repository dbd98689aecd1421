"""Learned rounding: exact values, gradients, never worse than its start, better than GPTQ on inputs it never saw.

Kinds: reference (QWeight.dequantize, finite differences), property (range, storable, determinism).
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight
from polybit.core.planes import pack, unpack
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.quant.gptq import gptq
from polybit.quant.rounding import Bank, RoundThrough, Tuning, batch_order, refine, rounding, start_latents

QUICK = Tuning(steps=60, lr=0.02, scale_lr=0.002)


def inputs(tokens: int, columns: int, seed: int) -> Tensor:
    """Correlated inputs: a few strong directions, as activations have them; only the seed differs between draws."""
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7)) * torch.linspace(2, 0.05, columns)
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) @ mix.T / columns**0.5


def stats_of(x_TI: Tensor) -> LayerStats:
    return LayerStats(x_TI.T @ x_TI / len(x_TI), x_TI.abs().mean(0), len(x_TI))


def toy(seed: int = 0) -> dict[str, Tensor]:
    """Two layers of a block, one with a short last group."""
    draw = torch.Generator().manual_seed(seed)
    return {"up": torch.randn(44, 40, generator=draw) / 6, "down": torch.randn(40, 44, generator=draw) / 6}


def run(weights: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
    """What follows the block looks at six directions only, which no layer-wise objective knows."""
    readout = torch.randn(40, 6, generator=torch.Generator().manual_seed(9))
    return torch.tanh(x_TI @ weights["up"].T) @ weights["down"].T @ readout


def quantized(weights: dict[str, Tensor], x_TI: Tensor, bits: int = 3) -> dict[str, QWeight]:
    """GPTQ layer by layer, the second on what the first passes on."""
    grid = Grid(bits, 16)
    up = gptq(weights["up"], stats_of(x_TI), grid)
    hidden = torch.tanh(x_TI @ up.dequantize().T)
    return {"up": up, "down": gptq(weights["down"], stats_of(hidden), grid)}


def dense(codes: Mapping[str, QWeight]) -> dict[str, Tensor]:
    return {name: q.dequantize() for name, q in codes.items()}


def block_loss(weights: dict[str, Tensor], x_TI: Tensor, batches: int):
    wanted = run(weights, x_TI)
    pieces, answers = x_TI.chunk(batches), wanted.chunk(batches)
    return lambda given, i: (run(given, pieces[i]) - answers[i]).square().mean()


STARTS = {
    "centre": lambda w, s: gptq(w, s, Grid(3, 16)),
    "level": lambda w, s: gptq(w, s, Grid(4, 16, "level")),
    "zero": lambda w, s: gptq(w, s, Grid(4, 16, "group")),
    "rows": lambda w, s: gptq(w, s, Grid(2, 0)),
}


@pytest.mark.parametrize("kind", STARTS)
def test_values_are_those_of_the_stored_weight(kind: str) -> None:
    """Bit for bit what QWeight.dequantize gives, before and after training, and it packs."""
    weight = toy()["down"]
    q = STARTS[kind](weight, stats_of(inputs(300, 44, 1)))
    bank = Bank({"w": q}, {"w": weight})
    assert torch.equal(bank.values()["w"], q.dequantize())
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        bank.latent_NL += torch.randn(bank.latent_NL.shape, generator=draw)
        bank.growth_N1 += 0.1 * torch.randn(bank.growth_N1.shape, generator=draw)
        bank.confine()
    moved = bank.harden()["w"]
    assert not torch.equal(moved.codes_OI, q.codes_OI)
    assert int(moved.codes_OI.max()) < 1 << q.bits
    assert torch.equal(bank.values()["w"], moved.dequantize())
    restored = unpack(pack(moved))
    assert torch.equal(restored.codes_OI, moved.codes_OI) and torch.equal(restored.scale_OG, moved.scale_OG)


def test_column_scales_are_kept() -> None:
    weight = toy()["down"]
    q = STARTS["centre"](weight, None)
    scaled = QWeight(
        q.codes_OI, q.scale_OG, q.zero, q.bits, q.group_size, {}, torch.linspace(0.5, 2, 44).half().float()
    )
    bank = Bank({"w": scaled}, {"w": scaled.dequantize()})
    assert torch.equal(bank.values()["w"], scaled.dequantize())
    assert torch.equal(bank.harden()["w"].codes_OI, q.codes_OI)


def test_gradient_of_the_scale_is_exact() -> None:
    """With latents on the codes, values are smooth in the scale: compare with finite differences."""
    draw = torch.Generator().manual_seed(0)
    latent = torch.randint(0, 16, (5, 8), generator=draw).double()
    scale = torch.rand(5, 1, generator=draw).double() + 0.5
    zero, top = torch.rand(5, 1, generator=draw).double(), torch.full((5, 1), 15.0).double()

    def smooth(scale: Tensor) -> Tensor:
        return RoundThrough.apply(latent, scale, zero, top).pow(3).sum()

    assert torch.autograd.gradcheck(smooth, (scale.requires_grad_(),))


def test_gradient_of_latents_passes_straight_inside_the_range_only() -> None:
    latent = torch.tensor([[-0.6, -0.4, 1.2, 3.4, 3.6]], requires_grad=True)
    ones = torch.ones(1, 1)
    values = RoundThrough.apply(latent, 2 * ones, 1.5 * ones, 3 * ones)
    assert values.tolist() == [[-3.0, -3.0, -1.0, 3.0, 3.0]]
    values.sum().backward()
    assert latent.grad is not None and latent.grad.tolist() == [[0.0, 2.0, 2.0, 2.0, 0.0]]


def test_latents_start_in_the_cells_of_the_start() -> None:
    weight = toy()["up"]
    q = STARTS["zero"](weight, stats_of(inputs(300, 40, 1)))
    latents = start_latents(q, weight)
    assert torch.equal(torch.floor(latents + 0.5), q.codes_OI.float())
    inside = (latents - q.codes_OI).abs() < 0.498
    expected = weight / q.scale_OG.repeat_interleave(16, 1)[:, :40] + q.zero.repeat_interleave(16, 1)[:, :40]
    torch.testing.assert_close(latents[inside], expected[inside])
    nearer = start_latents(q, weight, 0.4)
    assert torch.equal(nearer, (latents - q.codes_OI).clamp(-0.4, 0.4) + q.codes_OI)
    bank = Bank({"w": q}, {"w": weight}, 0.4)
    assert torch.equal(bank.latent_NL.detach().reshape(len(weight), -1)[:, :40], nearer)


def test_block_beats_gptq_on_inputs_it_never_saw() -> None:
    weights, seen, unseen = toy(), inputs(600, 40, 1), inputs(600, 40, 2)
    start = quantized(weights, seen)
    better = refine(start, weights, block_loss(weights, seen, 4), 4, tuning=QUICK)
    held_out = block_loss(weights, unseen, 1)
    before, after = float(held_out(dense(start), 0)), float(held_out(dense(better), 0))
    assert after < 0.9 * before
    assert all(better[n].bits == 3 and better[n].scale_OG.shape == start[n].scale_OG.shape for n in start)


def test_never_worse_than_its_start() -> None:
    """A rate that destroys everything gives the start back."""
    weights, seen = toy(), inputs(200, 40, 1)
    start = quantized(weights, seen)
    wild = Tuning(steps=5, lr=50.0, scale_lr=3.0)
    kept = refine(start, weights, block_loss(weights, seen, 2), 2, tuning=wild)
    assert all(torch.equal(kept[name].codes_OI, start[name].codes_OI) for name in start)
    assert refine(start, weights, block_loss(weights, seen, 2), 2, tuning=Tuning(steps=0)) == start


def test_same_seed_same_bits() -> None:
    weights, seen = toy(), inputs(200, 40, 1)
    start = quantized(weights, seen)
    one, same = (refine(start, weights, block_loss(weights, seen, 4), 4, tuning=QUICK) for _ in range(2))
    assert all(torch.equal(one[n].codes_OI, same[n].codes_OI) for n in start)
    assert all(torch.equal(one[n].scale_OG, same[n].scale_OG) for n in start)
    assert batch_order(4, QUICK) != batch_order(4, Tuning(steps=60, seed=1))


def test_single_layer_form_lowers_the_layer_loss() -> None:
    weight, stats = toy()["down"], stats_of(inputs(300, 44, 1))
    damped = stats.hessian_II + 0.01 * stats.hessian_II.diagonal().mean() * torch.eye(44)

    def loss(q: QWeight) -> float:
        error = q.dequantize() - weight
        return float(((error @ damped) * error).sum())

    grid = Grid(2, 16)
    assert loss(rounding(weight, stats, grid, tuning=QUICK)) <= loss(gptq(weight, stats, grid)) * (1 + 1e-5)
    assert rounding(weight, None, grid, tuning=QUICK).shape == (40, 44)


def test_impossible_tuning_is_refused() -> None:
    with pytest.raises(PolybitError, match="steps=-1"):
        Tuning(steps=-1)
