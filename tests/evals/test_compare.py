"""Story: the whole comparison – its schema to the letter, nothing for identical models, harm that grows as bits go."""

import json
import math

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.evals.compare import AS_LOADED, EvalMaterial, compare
from polybit.hub.lm import LocalLM
from tests.evals.test_tasks import Watched
from tests.evals.tiny import items, tokenizer
from tests.families import quantized, tiny_model

WINDOWS = torch.randint(3, 90, (12, 24), generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt number {i}" for i in range(8)]
ESTIMATE = {"value", "low", "high", "n"}
PRESET_KEYS = {
    *("perplexity", "delta_nll", "kl", "kl_p999", "top1", "flips_text", "flips", "margins", "flips_by_margin_decile"),
    *("flips_by_entropy_decile", "first_divergence", "identical", "survival", "survival_low", "survival_high"),
    *("tasks", "answers"),
}


def walk(value):
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


@pytest.fixture(scope="module")
def result():
    lm, ours = LocalLM(tiny_model("llama"), tokenizer()), LocalLM(quantized("llama"), tokenizer())
    material = EvalMaterial(WINDOWS, PROMPTS, {name: items(name, 6) for name in ("reading", "dialogue")}, max_tokens=10)
    sizes = {"w8": {"bits_per_weight": 8.5, "bytes": 1000}}
    return compare(lm, ours, ["w8", "w4", "w2"], material, sizes=sizes, shown=3)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def identical(request):
    lm = LocalLM(tiny_model(request.param), tokenizer())
    tasks = {"dialogue": items("dialogue", 6)}
    return compare(lm, lm, [None], EvalMaterial(WINDOWS, PROMPTS, tasks, max_tokens=10))["presets"][AS_LOADED]


def test_schema(result):
    assert set(result) == {"reference", "text", "prompts", "presets"}
    assert set(result["reference"]) == {"perplexity", "margin", "entropy", "tasks"}
    assert result["text"] == {"windows": 12, "window_tokens": 24, "tokens": 12 * 23}
    assert result["prompts"] == {"n": 8, "max_tokens": 10}
    assert list(result["presets"]) == ["w8", "w4", "w2"]
    for name, row in result["presets"].items():
        assert set(row) - {"bits_per_weight", "bytes"} == PRESET_KEYS
        assert ("bits_per_weight" in row) == (name == "w8")
        for key in ("perplexity", "delta_nll", "kl", "top1", "flips_text", "flips", "first_divergence", "identical"):
            assert set(row[key]) == ESTIMATE
        assert row["kl"]["n"] == 12 and row["flips"]["n"] == 8
        assert len(row["flips_by_margin_decile"]) == len(row["flips_by_entropy_decile"]) == 10
        assert len(row["survival"]) == len(row["survival_low"]) == len(row["survival_high"]) == 10
        reading = row["tasks"]["reading"]
        assert set(reading) == {
            *("em", "f1", "difference", "flips", "correct_to_wrong", "wrong_to_correct", "predictions_sha256")
        }
        assert len(row["answers"]) == 3
        for answer in row["answers"]:
            assert answer["prompt"] and len(answer["tokens_reference"]) <= 10
            star = answer["first_difference_token"]
            if star is not None:
                assert answer["tokens_reference"][:star] == answer["tokens_quantized"][:star]


def test_everything_is_json_and_every_interval_holds_its_value(result, identical):
    for whole in (result, identical):
        assert json.loads(json.dumps(whole, allow_nan=False)) == whole
        estimates = [value for value in walk(whole) if isinstance(value, dict) and set(value) >= ESTIMATE]
        assert len(estimates) > 20
        for estimate in estimates:
            assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["n"] >= 1


def test_harm_grows_as_bits_go(result):
    w8, w4, w2 = result["presets"].values()
    assert w8["kl"]["value"] < w4["kl"]["value"] < w2["kl"]["value"]
    assert w8["flips_text"]["value"] <= w4["flips_text"]["value"] < w2["flips_text"]["value"]
    assert w8["first_divergence"]["value"] >= w2["first_divergence"]["value"]
    assert w8["top1"]["value"] == pytest.approx(1 - w8["flips_text"]["value"])
    ratio = w4["perplexity"]["value"] / result["reference"]["perplexity"]["value"]
    assert math.log(ratio) == pytest.approx(w4["delta_nll"]["value"], abs=1e-6)


def test_identical_models_differ_in_nothing(identical):
    assert identical["kl"]["value"] == identical["kl_p999"] == identical["delta_nll"]["value"] == 0
    assert identical["flips"]["value"] == identical["flips_text"]["value"] == 0
    assert identical["top1"]["value"] == identical["identical"]["value"] == 1
    assert identical["survival"] == [1.0] * 10
    lengths = [len(answer["tokens_reference"]) for answer in identical["answers"]]
    assert identical["first_divergence"]["value"] == pytest.approx(10) and lengths == [10] * 6
    assert all(answer["first_difference_token"] is None for answer in identical["answers"])
    assert identical["tasks"]["dialogue"]["flips"]["value"] == 0
    assert identical["tasks"]["dialogue"]["difference"]["exact"]["value"] == 0


def test_every_prediction_is_sealed_before_an_answer_is_read():
    lm = LocalLM(tiny_model("llama"), tokenizer())
    log = []
    generate = lm.generate
    lm.generate = lambda *args, **options: log.append("generate") or generate(*args, **options)
    tasks = {name: [Watched(item, log) for item in items(name, 2)] for name in ("reading", "dialogue")}
    compare(lm, lm, [None], EvalMaterial(WINDOWS[:2], (), tasks))
    assert log[:4] == ["generate"] * 4 and set(log[4:]) == {"answer"}


def test_without_prompts_and_tasks():
    lm = LocalLM(tiny_model("llama"), tokenizer())
    row = compare(lm, lm, [None], EvalMaterial(WINDOWS[:2]))["presets"][AS_LOADED]
    assert row["flips"] is row["first_divergence"] is row["identical"] is None
    assert row["survival"] == row["answers"] == [] and row["tasks"] == {}
    with pytest.raises(PolybitError, match="No precision"):
        compare(lm, lm, [], EvalMaterial(WINDOWS[:2]))
    with pytest.raises(PolybitError, match="context of 64"):
        compare(lm, lm, [None], EvalMaterial(WINDOWS[:2], PROMPTS, max_tokens=64))
