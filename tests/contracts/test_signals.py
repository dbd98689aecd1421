"""What every sensitivity signal of the table promises: it finds a damaged layer, in nats, again, and after a stop."""

import numpy as np
import pytest
import torch

from polybit.compress.source import SourceName
from polybit.core.parts import load
from polybit.measure.kept import SensitivityTask, measured
from polybit.measure.quantizing import Quantizing
from polybit.measure.signals import gather, split_half
from polybit.measure.table import SIGNALS
from tests.families import tiny_model
from tests.measure.test_sensitivity import inside, probes

everyone = pytest.mark.parametrize("name", SIGNALS)


def read(name, candidates, **asked):
    """(model's targets, readings by block) of a tiny model."""
    model = tiny_model("llama").requires_grad_(False)
    chosen = inside(model)
    return chosen, list(SIGNALS[name](model, probes(), chosen, candidates, **asked))


def nudge(target, weight_OI, stats):
    """A change of every layer, smaller for the wider of two widths."""
    noise_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(target.rows + len(target.name)))
    return {2: weight_OI + 0.02 * noise_OI, 4: weight_OI + 0.002 * noise_OI}


@everyone
def test_says_what_it_is(name):
    part = SIGNALS[name]
    assert part.summary and not part.summary.endswith(".") and part.unit == "nats"
    assert load(part.function).__doc__


@everyone
def test_finds_the_layer_that_was_damaged_on_purpose(name):
    victim = inside(tiny_model("llama"))[9].name

    def damage(target, weight_OI, stats):
        return {4: weight_OI * (0.2 if target.name == victim else 0.999)}

    chosen, readings = read(name, damage)
    for signal in gather(readings, {t.name: t.size for t in chosen}).values():
        row = signal.table().nats
        assert max(row, key=lambda layer: row[layer][4]) == victim


@everyone
def test_units_are_sums_over_counted_tokens_of_each_item(name):
    """A layer left alone harms nothing; less change, less harm; tokens and items are those of the probe."""

    def half(target, weight_OI, stats):
        return nudge(target, weight_OI, stats) if target.rows % 3 else {2: weight_OI, 4: weight_OI}

    chosen, readings = read(name, half)
    found = gather(readings, {t.name: t.size for t in chosen})
    assert found.keys() == {probe.name for probe in probes()}
    for probe in probes():
        signal = found[probe.name]
        counted = torch.cat([marks_BT[:, 1:].sum(1) for marks_BT in probe.counted])
        assert signal.tokens_N.tolist() == counted.tolist()
        assert signal.kl_LWN.shape == signal.nll_LWN.shape == (len(chosen), 2, probe.items)
        assert np.isfinite(signal.kl_LWN).all() and np.isfinite(signal.nll_LWN).all()
        kl_LW = signal.kl_LWN.sum(-1)
        for target, row in zip(chosen, kl_LW, strict=True):
            assert (row[0] > row[1] > 0) if target.rows % 3 else np.allclose(row, 0, atol=1e-6)


@everyone
def test_intervals_and_halves(name):
    chosen, readings = read(name, nudge)
    signal = gather(readings, {t.name: t.size for t in chosen})["task"]
    for row in signal.estimates().values():
        assert all(estimate.low <= estimate.value <= estimate.high for estimate in row.values())
    assert -1 <= split_half(signal) <= 1


@everyone
def test_the_seed_decides(name):
    def kl(seed):
        chosen, readings = read(name, nudge, seed=seed)
        return gather(readings, {t.name: t.size for t in chosen})["text"].kl_LWN

    assert (kl(1) == kl(1)).all()
    assert (kl(1) == kl(2)).all() != SIGNALS[name].drawn


@everyone
def test_blocks_asked_for_are_those_of_all(name):
    _, every = read(name, nudge)
    _, some = read(name, nudge, only={1})
    assert [reading.block for reading in some] == [1]
    wanted = next(reading for reading in every if reading.block == 1)
    for probe, layers in wanted.kl.items():
        for layer, row in layers.items():
            assert all((some[0].kl[probe][layer][width] == values).all() for width, values in row.items())


@everyone
def test_blocks_that_are_not_asked_for_cost_no_candidates(name):
    tried = []

    def noted(target, *rest):
        tried.append(target.name)
        return nudge(target, *rest)

    chosen, readings = read(name, noted, only={1})
    assert sorted(tried) == sorted(readings[0].kl["text"]) and 0 < len(tried) < len(chosen)


@everyone
def test_a_stopped_measurement_goes_on_to_the_same_numbers(name, tmp_path):
    model = tiny_model("llama").requires_grad_(False)
    windows = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    quantizing = Quantizing((2, 4), "gptq", 32)
    task = SensitivityTask(SourceName("unused"), tuple(inside(model)), tuple(probes()), (windows,), quantizing, name, 3)
    whole = measured(model, task, "digest", tmp_path)
    again = measured(model, task, "digest", tmp_path)
    assert again.cost["measured_now"] == 0
    next(iter(sorted(tmp_path.glob("*/block-*.npz")))).unlink()
    resumed = measured(model, task, "digest", tmp_path)
    assert resumed.cost["measured_now"] == 1
    for probe, signal in whole.signals.items():
        for other in (again, resumed):
            assert (other.signals[probe].kl_LWN == signal.kl_LWN).all()
            assert (other.signals[probe].nll_LWN == signal.nll_LWN).all()
    assert all(
        torch.equal(q.codes_OI, resumed.bank[layer][width].codes_OI)
        for layer, row in whole.bank.items()
        for width, q in row.items()
    )
