"""Reference: every number against a twin that runs one prefix at a time in double precision."""

import math

import numpy as np
import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.evals.perplexity import perplexity, token_nll
from polybit.evals.token_flip import (
    answer_batches,
    first_divergence,
    flips_by,
    margin_summary,
    mean_by_text,
    measure_tokens,
    rank_bins,
    survival,
    text_batches,
)
from polybit.hub.lm import LocalLM
from tests.evals.models import KnowsNext, Uniform
from tests.evals.tiny import tokenizer
from tests.families import quantized, tiny_model

WINDOWS = torch.randint(3, 90, (5, 12), generator=torch.Generator().manual_seed(0))


def pair():
    return LocalLM(tiny_model("llama"), tokenizer(), batch_tokens=30), LocalLM(quantized("llama"), tokenizer())


def next_probabilities(lm, prefix):
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([prefix])).logits[0, -1].double().softmax(-1).tolist()


def token_twin(reference, quantized, row, t):
    """All columns at token t of a row, from two distributions and plain arithmetic."""
    p, q = next_probabilities(reference, row[:t]), next_probabilities(quantized, row[:t])
    by_p, by_q = sorted(p, reverse=True), sorted(q, reverse=True)
    return {
        "kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "nll": (-math.log(p[row[t]]), -math.log(q[row[t]])),
        "margin": (by_p[0] - by_p[1], by_q[0] - by_q[1]),
        "entropy": -sum(a * math.log(a) for a in p),
        "agrees": p.index(by_p[0]) == q.index(by_q[0]),
    }


@pytest.fixture(scope="module")
def measured():
    reference, ours = pair()
    tokens, tables = measure_tokens(reference, ours, ["w8", "w3"], text_batches(reference, WINDOWS), label="text")
    return reference, ours, tokens, tables


@pytest.mark.parametrize("preset", ["w8", "w3"])
def test_columns_equal_the_slow_twin(measured, preset):
    reference, ours, tokens, tables = measured
    table = tables[preset]
    n = 0
    with ours.at(preset):
        for text, row in enumerate(WINDOWS.tolist()):
            for t in range(1, len(row)):
                want = token_twin(reference, ours, row, t)
                assert tokens.text_N[n] == text
                assert table.kl_N[n] == pytest.approx(want["kl"], rel=2e-3, abs=2e-6)
                assert (tokens.nll_N[n], table.nll_N[n]) == pytest.approx(want["nll"], abs=1e-4)
                assert (tokens.margin_N[n], table.margin_N[n]) == pytest.approx(want["margin"], abs=1e-4)
                assert tokens.entropy_N[n] == pytest.approx(want["entropy"], abs=1e-4)
                assert table.agrees_N[n] == want["agrees"] or want["margin"][1] < 1e-5
                n += 1
    assert n == len(tokens.text_N) == len(table.kl_N)


def test_small_kl_survives_float32():
    reference = LocalLM(tiny_model("llama"), tokenizer())
    near = LocalLM(tiny_model("llama"), tokenizer())
    with torch.no_grad():
        near.model.model.layers[0].mlp.down_proj.weight.mul_(1.001)
    _, tables = measure_tokens(reference, near, [None], text_batches(reference, WINDOWS[:2]), label="text")
    want = [token_twin(reference, near, row, t)["kl"] for row in WINDOWS[:2].tolist() for t in range(1, 12)]
    assert 0 < max(want) < 1e-4
    assert tables[None].kl_N == pytest.approx(want, rel=0.02, abs=3e-8)


def test_identical_models_differ_nowhere():
    lm = LocalLM(tiny_model("gpt2"), tokenizer())
    tokens, tables = measure_tokens(lm, lm, [None], text_batches(lm, WINDOWS), label="text")
    table = tables[None]
    assert (table.kl_N == 0).all() and table.agrees_N.all() and (table.nll_N == tokens.nll_N).all()
    assert margin_summary(tokens, table, seed=0)["difference"]["value"] == 0


def test_null_and_gold_models_have_the_perplexity_they_must():
    stream = torch.arange(60).reshape(5, 12)
    assert perplexity(LocalLM(Uniform(), tokenizer()), WINDOWS).value == pytest.approx(96, rel=1e-5)
    gold = perplexity(LocalLM(KnowsNext(), tokenizer()), stream)
    assert gold.value == pytest.approx(1, abs=1e-4) and gold.n == 5
    wrong = perplexity(LocalLM(KnowsNext(), tokenizer()), WINDOWS)
    assert wrong.value > 1e3


def test_perplexity_equals_the_twin():
    lm = LocalLM(tiny_model("llama"), tokenizer(), batch_tokens=30)
    nll = [[-math.log(next_probabilities(lm, row[:t])[row[t]]) for t in range(1, 12)] for row in WINDOWS.tolist()]
    assert token_nll(lm, WINDOWS) == pytest.approx(np.array(nll), abs=1e-4)
    got = perplexity(lm, WINDOWS)
    assert got.value == pytest.approx(math.exp(np.mean(nll)), rel=1e-4) and got.low < got.value < got.high


def test_answers_count_only_their_own_tokens():
    reference, ours = pair()
    prompts = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24, 25]]
    answers = reference.generate_tokens(prompts, max_tokens=6)
    batches = answer_batches(reference, prompts, answers)
    tokens, tables = measure_tokens(reference, ours, ["w3"], batches, label="answers")
    assert sorted(tokens.text_N.tolist()) == sorted(n for n, answer in enumerate(answers) for _ in answer)
    with ours.at("w3"):
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            # flip(t) = 1 when the quantized model's choice after (x, y_<t) is not y_t
            flips = []
            for t, token in enumerate(answer):
                q = next_probabilities(ours, prompt + answer[:t])
                flips.append(q.index(max(q)) != token)
            assert (~tables["w3"].agrees_N[tokens.text_N == number]).tolist() == flips
    assert not tables["w3"].agrees_N.all()


def test_reference_runs_once_whatever_the_number_of_presets():
    reference, ours = pair()
    calls = []
    forward = reference.model.forward
    reference.model.forward = lambda **inputs: calls.append(1) or forward(**inputs)
    batches = text_batches(reference, WINDOWS)
    measure_tokens(reference, ours, ["w8", "w4", "w3", "w2"], batches, label="text")
    assert len(calls) == len(batches) == 3


def test_first_divergence_and_survival():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert (
        first_divergence([1, 2], [1, 2, 3]) == 2
        and first_divergence([7], [8]) == 0
        and first_divergence([], []) is None
    )
    stars = [None, 0, 2, 2, 5]
    curve = survival(stars, 6, seed=0)
    assert curve["survival"] == [sum(s is None or s > k for s in stars) / 5 for k in range(6)]
    for low, value, high in zip(curve["survival_low"], curve["survival"], curve["survival_high"], strict=True):
        assert low <= value <= high


def test_deciles_equal_sorting_by_hand(measured):
    _, _, tokens, tables = measured
    rows = flips_by(tokens.margin_N, tables["w3"], tokens.text_N, seed=0)
    order = sorted(range(len(tokens.margin_N)), key=lambda i: tokens.margin_N[i])
    assert len(rows) == 10 and sum(row["n"] for row in rows) == len(order)
    place = 0
    for row in rows:
        inside = order[place : place + row["n"]]
        place += row["n"]
        assert row["value"] == pytest.approx(np.mean([not tables["w3"].agrees_N[i] for i in inside]))
        assert (row["from"], row["to"]) == (tokens.margin_N[inside[0]], tokens.margin_N[inside[-1]])
        assert row["low"] <= row["value"] <= row["high"]


def test_bins_and_texts():
    assert rank_bins(np.array([5.0, 1.0, 1.0, 9.0]), 2).tolist() == [1, 0, 0, 1]
    assert mean_by_text(np.array([1.0, 3.0, 10.0]), np.array([0, 0, 4])).tolist() == [2.0, 10.0]


def test_margin_histogram_counts_every_text(measured):
    _, _, tokens, tables = measured
    summary = margin_summary(tokens, tables["w3"], seed=0)
    assert sum(summary["reference"]) == sum(summary["quantized"]) == 5 and len(summary["edges"]) == 21
    want = [np.mean(tokens.margin_N[tokens.text_N == text]) for text in range(5)]
    assert summary["reference_mean"]["value"] == pytest.approx(np.mean(want))


def test_broken_models_are_named():
    reference, ours = pair()
    next(ours.model.parameters()).data.fill_(math.nan)
    with pytest.raises(PolybitError, match="at w4 gives NaN"):
        measure_tokens(reference, ours, ["w4"], text_batches(reference, WINDOWS), label="text")
    other = LocalLM(Uniform(50), tokenizer())
    with pytest.raises(PolybitError, match=r"vocabulary of 96 .* 50"):
        measure_tokens(reference, other, [None], text_batches(reference, WINDOWS), label="text")
