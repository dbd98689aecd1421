"""Margins of gates: what is read is what single steps say, and the margin is the least that removes its share."""

import numpy as np
import pytest
import torch

from polybit.hub.rows import TokenRows
from polybit.kernels import cpu
from polybit.serve.gate_fit import GateReading, fit_gate, margin_for, outcome, read_pair
from polybit.serve.runners import RowRunner
from tests.hub.test_rows import make


def readings(answers=40, tokens=30, seed=0):
    """Tokens that flip the more often the thinner their lead is."""
    draw = np.random.default_rng(seed)
    lead = draw.exponential(2.0, answers * tokens)
    return GateReading(lead, draw.random(len(lead)) < np.exp(-4 * lead), np.repeat(np.arange(answers), tokens))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 1.0])
def test_the_margin_is_the_least_that_removes_its_share(share):
    reading = readings()
    slow = min(m for m in np.nextafter(reading.lead_N, np.inf) if outcome(reading, m)[0] >= share - 1e-12)
    assert margin_for(reading, share) == pytest.approx(slow, rel=1e-12)


def test_what_is_learnt_holds_on_other_answers():
    found = fit_gate(readings(200), 1.3)
    assert found["removed"]["low"] > 0.85 and found["removed"]["low"] <= found["removed"]["value"]
    assert found["extra_bytes"]["value"] == pytest.approx(1.3 * found["gated"])
    costs = [point["extra_bytes"] for point in found["frontier"]]
    assert costs == sorted(costs)
    none = readings()
    assert fit_gate(GateReading(none.lead_N, np.zeros_like(none.flip_N), none.answer_N), 1.0)["margin"] == 0.0


@pytest.mark.skipif(cpu.library() is None, reason="needs the compiled kernels")
def test_a_pair_is_read_as_token_after_token_would_be():
    runner = RowRunner(make("llama"), slots=2, room=64)
    draw = torch.Generator().manual_seed(0)
    prompts, answers = (
        [torch.randint(0, 64, (n,), generator=draw).tolist() for n in sizes] for sizes in ((5, 1), (9, 4))
    )
    found = read_pair(runner, "w2", "w8", prompts, answers)
    leads, flips = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = prompt + answer
        for at in range(len(text) - 1):
            wide = runner.read([TokenRows(runner.setting("w8"), 1, at, text[at : at + 1])], [1])[0][0]
            width = "w8" if at < len(prompt) - 1 else "w2"
            low = runner.read([TokenRows(runner.setting(width), 0, at, text[at : at + 1])], [1])[0][0]
            if at >= len(prompt) - 1:
                first, second = low.topk(2).values.tolist()
                leads.append(first - second)
                flips.append(int(low.argmax()) != int(wide.argmax()))
    assert found.lead_N.tolist() == pytest.approx(leads, abs=1e-6) and found.flip_N.tolist() == flips
    assert found.answer_N.tolist() == [0] * 9 + [1] * 4
