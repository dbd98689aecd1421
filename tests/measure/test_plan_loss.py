"""Whole plans: equal to putting the weights into the model and running it; nothing quantized costs nothing."""

import copy

import pytest
import torch
from torch.nn.functional import log_softmax

from polybit.compress.blocks import as_stored
from polybit.core.affine import Grid
from polybit.measure import passage
from polybit.measure.plan_loss import PlanLoss
from polybit.quant.rtn import rtn
from tests.families import tiny_model
from tests.measure.test_sensitivity import inside, probes


@pytest.mark.parametrize("words", [passage.LOGITS, 300, 1])
def test_equals_a_model_with_these_weights(words, monkeypatch):
    """Logits of all positions at once, of a few, of one."""
    monkeypatch.setattr(passage, "LOGITS", words)
    model = tiny_model("gpt2")
    chosen = inside(model)
    bank = {t.name: {b: rtn(t.weight_OI(model), None, Grid(b, 32), points=3) for b in (2, 4)} for t in chosen}
    plan = {t.name: 2 if at % 3 else 4 for at, t in enumerate(chosen)}
    found = PlanLoss(model, probes(), chosen, bank)(plan)
    other = copy.deepcopy(model)
    for t in chosen:
        t.parameter(other).data = as_stored(t, bank[t.name][plan[t.name]].dequantize(), other)
    for probe in probes():
        kl, rise = [], []
        for ids_BT, counted_BT in zip(probe.ids, probe.counted, strict=True):
            with torch.no_grad():
                p_BTV, q_BTV = (log_softmax(m(input_ids=ids_BT).logits, -1) for m in (model, other))
            for row in range(len(ids_BT)):
                at = counted_BT[row].nonzero()[:, 0]
                p, q, ids = p_BTV[row, at - 1], q_BTV[row, at - 1], ids_BT[row, at]
                kl.append(float((p.exp() * (p - q)).sum()))
                rise.append(float((p - q).gather(1, ids[:, None]).sum()))
        reading = found[probe.name]
        assert torch.allclose(torch.tensor(reading.kl_N), torch.tensor(kl, dtype=torch.float64), rtol=1e-3, atol=1e-4)
        assert torch.allclose(
            torch.tensor(reading.nll_N), torch.tensor(rise, dtype=torch.float64), rtol=1e-3, atol=1e-4
        )
        assert reading.kl == reading.kl_N.sum() / reading.tokens_N.sum()


def test_float_weights_cost_nothing():
    model = tiny_model("llama")
    reading = PlanLoss(model, probes()[:1], inside(model), {})({})["text"]
    assert abs(reading.kl) < 1e-9 and abs(reading.nll) < 1e-9
