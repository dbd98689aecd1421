"""Sensitivities: equal to running the whole model for every layer and width, for less; they find a damaged layer."""

import pytest
import torch
from torch.nn.functional import log_softmax

from polybit.compress.blocks import as_stored, find_blocks, outside
from polybit.core.affine import Grid
from polybit.core.runtime import PolybitError
from polybit.measure.probe import answer_probe, text_probe
from polybit.measure.sensitivity import measure_layers
from polybit.measure.signals import gather
from polybit.nn.convert import targets
from polybit.quant.rtn import rtn
from tests.families import tiny_model


def round_all(target, weight_OI, stats):
    """Round to nearest at 2 and 4 bits."""
    return {bits: rtn(weight_OI, stats, Grid(bits, 32), points=3).dequantize() for bits in (2, 4)}


def probes():
    """Two windows of text, and three items of different lengths whose last tokens count."""
    torch.manual_seed(1)
    rows = [(torch.randint(3, 90, (n,)).tolist(), [False] * (n - 3) + [True] * 3) for n in (9, 12, 7)]
    return [text_probe("text", torch.randint(3, 90, (2, 10)), batch=1), answer_probe("task", rows, tokens=24)]


@torch.no_grad()
def literally(model, probe, target, weight_OI):
    """KL and rise of the loss per item: swap the weight, run the whole model, swap it back, token by token."""
    found = []
    parameter = target.parameter(model)
    for ids_BT, counted_BT in zip(probe.ids, probe.counted, strict=True):
        before = log_softmax(model(input_ids=ids_BT).logits, -1)
        kept = parameter.data.clone()
        parameter.data = as_stored(target, weight_OI, model)
        after = log_softmax(model(input_ids=ids_BT).logits, -1)
        parameter.data = kept
        for row in range(len(ids_BT)):
            kl = rise = 0.0
            for t in range(1, ids_BT.shape[1]):
                if counted_BT[row, t]:
                    p, q = before[row, t - 1], after[row, t - 1]
                    kl += float((p.exp() * (p - q)).sum())
                    rise += float(p[ids_BT[row, t]] - q[ids_BT[row, t]])
            found.append((kl, rise))
    return torch.tensor(found, dtype=torch.float64).T


def inside(model):
    chosen = targets(model)
    outer = {t.name for t in outside(model, chosen)}
    return [t for t in chosen if t.name not in outer]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "phi", "opt", "mixtral", "gemma"])
def test_equals_the_literal_measurement(family):
    model = tiny_model(family)
    chosen = inside(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    readings = list(measure_layers(model, probes(), chosen, round_all))
    for probe in probes():
        for target in chosen:
            reading = next(r for r in readings if target.name in r.kl[probe.name])
            for width, weight_OI in round_all(target, target.weight_OI(model), None).items():
                kl, rise = literally(model, probe, target, weight_OI)
                assert torch.allclose(
                    torch.tensor(reading.kl[probe.name][target.name][width]), kl, atol=2e-4, rtol=1e-3
                )
                assert torch.allclose(
                    torch.tensor(reading.nll[probe.name][target.name][width]), rise, atol=2e-4, rtol=1e-3
                )
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items()), "the model was changed"
    assert not any("forward" in vars(module) for module in model.modules())


def test_takes_at_most_six_tenths_of_the_naive_forwards():
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.families import GROUPED

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED | {"num_hidden_layers": 5})).eval()
    chosen = inside(model)
    _, modules = find_blocks(model, chosen)
    ran = []
    for (
        module
    ) in modules:  # what really runs is seen by the layer that no cache ever replaces: the norm after attention
        module.post_attention_layernorm.register_forward_hook(lambda *_: ran.append(1))
    readings = list(measure_layers(model, probes()[:1], chosen, round_all))
    work, naive = sum(r.work for r in readings), sum(r.naive for r in readings)
    assert naive == 2 * 5 * 5 * (1 + 7 * 2)  # batches, blocks, and for each block the float model and its candidates
    assert work <= 0.6 * naive
    assert len(ran) <= 0.65 * naive  # blocks entered, also those of which only a part was computed


def test_blocks_can_be_shared_out_and_put_together():
    model = tiny_model("llama")
    chosen = inside(model)
    whole = gather(measure_layers(model, probes(), chosen, round_all), {t.name: t.size for t in chosen})
    parts = [r for only in ({1}, {0}) for r in measure_layers(model, probes(), chosen, round_all, only=only)]
    joined = gather(parts, {t.name: t.size for t in chosen})
    assert whole["task"].names == joined["task"].names
    assert (whole["task"].kl_LWN == joined["task"].kl_LWN).all()


def test_finds_the_layer_that_was_damaged():
    model = tiny_model("llama")
    chosen = inside(model)
    victim = chosen[9].name

    def damage(target, weight_OI, stats):
        return {4: weight_OI * (0.2 if target.name == victim else 0.999)}

    signal = gather(measure_layers(model, probes(), chosen, damage), {t.name: t.size for t in chosen})["text"]
    row = signal.table().nats
    assert max(row, key=lambda name: row[name][4]) == victim


def test_statistics_come_from_the_calibration_text():
    model = tiny_model("llama")
    chosen = inside(model)
    torch.manual_seed(2)
    calibration = [torch.randint(3, 90, (2, 12)) for _ in range(2)]
    seen = {}

    def keep(target, weight_OI, stats):
        seen[target.name] = stats
        return {4: weight_OI}

    list(measure_layers(model, probes(), chosen, keep, calibration=calibration))
    assert {s.tokens for s in seen.values()} == {48}


def test_refuses_what_has_nothing_to_read():
    with pytest.raises(PolybitError, match="no answer token"):
        answer_probe("empty", [([1, 2, 3], [False, False, False])])
    with pytest.raises(PolybitError, match="0 items"):
        answer_probe("empty", [])
