"""Learned rounding of several widths in one code: the narrow ones gain, the widest is chosen behind them, the start
comes back where that is no gain."""

from dataclasses import replace

import pytest
import torch

from polybit.compress import refine_nested
from polybit.compress.loop import compress
from polybit.compress.recipe import choose
from polybit.compress.refine import taught
from polybit.compress.refine_nested import REACHES, better, finish_nested, first_better, sampled
from polybit.core.affine import Grid
from polybit.nn.convert import targets
from polybit.quant.nested import nested
from polybit.quant.rounding import Tuning
from tests.families import tiny_model

WIDTHS = (8, 4, 2)
TUNING = Tuning(steps=24, lr=0.02, inside=0.4)


def text():
    return list(torch.randint(0, 60, (8, 24), generator=torch.Generator().manual_seed(1)).split(4))


def rough(widths=WIDTHS, **kwargs):
    """A float model, and nested codes that no calibration text has seen."""
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    every = targets(model, **kwargs)
    grid = Grid(max(widths), 16, "group")
    start = {t.name: nested(t.weight_OI(model), None, grid, widths=widths, rounds=1, sweeps=1) for t in every}
    return model, every, start


def lost(model, every, codes, widths=WIDTHS):
    return sampled(codes, widths, taught(model, text(), every, codes)[0].divergence, 2)


@pytest.mark.parametrize("ends", [False, True])
def test_narrow_widths_gain_and_the_widest_is_chosen_behind_them(ends):
    model, every, start = rough(include_embeddings=ends)
    found = finish_nested(model, text(), every, start, widths=WIDTHS, tuning=TUNING)
    before, after = lost(model, every, start), lost(model, every, found)
    assert after[4] < before[4] and after[2] < 0.9 * before[2] and after[8] < 0.2 * after[4], (before, after)
    assert found.keys() == start.keys() and all(q.bits == 8 for q in found.values())


def test_bits_behind_the_learned_ones_are_chosen_again(monkeypatch):
    """What 8 bits lose is less than with the bits that lie nearest to the start's."""
    model, every, start = rough()
    chosen = finish_nested(model, text(), every, start, widths=WIDTHS, tuning=TUNING)
    monkeypatch.setattr(refine_nested, "lower_bits", lambda _weight, _stats, q, **_: q)
    nearest = finish_nested(model, text(), every, start, widths=WIDTHS, tuning=TUNING)
    assert all(torch.equal(q.codes_OI >> 4, nearest[n].codes_OI >> 4) for n, q in chosen.items())
    assert lost(model, every, chosen)[8] < lost(model, every, nearest)[8]


def test_the_start_comes_back_where_no_reach_is_better(monkeypatch):
    model, every, start = rough()
    tried = []
    monkeypatch.setattr(refine_nested, "better", lambda before, after, _: tried.append((before, after)) and False)
    kept = finish_nested(model, text(), every, start, widths=WIDTHS, tuning=TUNING)
    assert all(torch.equal(kept[n].codes_OI, q.codes_OI) for n, q in start.items())
    lost_8 = [after[8] for _, after in tried]
    assert len(tried) == 3 and lost_8 == sorted(lost_8, reverse=True), "a smaller reach costs 8 bits less"


def test_the_largest_reach_that_is_better_is_taken():
    """Of three the first is worse than the start; after the second none is asked for."""
    asked = []
    good = {REACHES[0]: False, REACHES[1]: True}
    found = first_better(lambda reach: asked.append(reach) or {"at": reach}, lambda codes: good[codes["at"]])
    assert found == {"at": REACHES[1]} and asked == list(REACHES[:2])


def test_wide_widths_alone_are_left_as_they_are():
    model, every, start = rough((8, 6))
    assert finish_nested(model, text(), every, start, widths=(8, 6), tuning=TUNING) == start


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        ({8: 0.004, 4: 0.05, 2: 1.0}, True),  # 8 bits lost what nobody hears
        ({8: 0.0001, 4: 0.11, 2: 2.0}, False),  # nobody gained
        ({8: 0.02, 4: 0.01, 2: 0.1}, False),  # 8 bits lost too much
        ({8: 0.0001, 4: 0.12, 2: 1.0}, True),  # 4 bits paid for 2
    ],
)
def test_what_counts_as_better(after, wanted):
    assert better({8: 0.0001, 4: 0.1, 2: 2.0}, after, 5e-3) is wanted


def test_memory_counts_every_learned_width():
    of = {method: choose(method, widths, 64, effort="best") for method, widths in
          {"nested": (8, 6, 5, 4, 3, 2), "rounding": (3,)}.items()}  # fmt: skip
    assert of["nested"].learned_widths == (5, 4, 3, 2) and of["rounding"].learned_widths == (3,)
    assert of["nested"].finish_bytes == 20 + 3 * 16 and of["rounding"].finish_bytes == 20


def test_block_by_block_narrow_widths_gain_too(monkeypatch):
    """Where the whole model does not fit; the statistics of every layer reach the choice of the bits behind."""
    seen, chosen = [], refine_nested.lower_bits
    spied = lambda weight_OI, stats, q, **how: seen.append(stats) or chosen(weight_OI, stats, q, **how)  # noqa: E731
    monkeypatch.setattr(refine_nested, "lower_bits", spied)
    monkeypatch.setattr("polybit.compress.loop.NESTED_BLOCK", Tuning(lr=0.03, inside=0.45))
    recipe = replace(choose("nested", WIDTHS, 16), block_steps=60)
    model, every, _ = rough()
    start, found = ({}, {})
    for codes, how in ((start, replace(recipe, block_steps=0)), (found, recipe)):
        for part in compress(model, every, text(), how):
            codes |= part
    before, after = lost(model, every, start), lost(model, every, found)
    assert after[2] < before[2] and any(not torch.equal(q.codes_OI, start[n].codes_OI) for n, q in found.items())
    assert len(seen) == len(every) and all(stats is not None for stats in seen)
