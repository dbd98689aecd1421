"""Contract of every metric: no harm where nothing changed, finite, sure of itself, deterministic, seen everywhere."""

import json
import math
from pathlib import Path

import pytest
import torch

from polybit.evals.compare import AS_LOADED, EvalMaterial, compare, read_both
from polybit.evals.schema import CHECKS, document, problems
from polybit.evals.table import METRICS, REFERENCE, SUITES, TASKS
from polybit.hub.lm import LocalLM
from polybit.report.card import model_card
from polybit.report.columns import chosen
from polybit.report.html import page
from polybit.report.summary import terminal_table
from polybit.report.tables import FORMS
from tests.evals.tiny import items, tokenizer
from tests.families import quantized, tiny_model

WINDOWS = torch.randint(3, 90, (6, 24), generator=torch.Generator().manual_seed(1))
MATERIAL = EvalMaterial(WINDOWS, [f"prompt {i}" for i in range(5)], {"dialogue": items("dialogue", 3)}, max_tokens=8)


@pytest.fixture(scope="module")
def float_lm():
    return LocalLM(tiny_model("llama"), tokenizer())


@pytest.fixture(scope="module")
def numbers(float_lm):
    sizes = {"w3": {"bits_per_weight": 3.4, "bytes": 1000}}
    return compare(float_lm, LocalLM(quantized("llama"), tokenizer()), ["w3"], MATERIAL, sizes=sizes)


@pytest.fixture(scope="module")
def harmed(float_lm):
    return read_both(float_lm, LocalLM(quantized("llama"), tokenizer()), ["w3"], MATERIAL, seed=0)["w3"]


@pytest.fixture(scope="module")
def unharmed(float_lm):
    return read_both(float_lm, float_lm, [None], MATERIAL, seed=0)[None]


def plain(value):
    return value["value"] if isinstance(value, dict) and "value" in value else value


@pytest.mark.parametrize("key", METRICS)
def test_is_described(key):
    metric = METRICS[key]
    assert metric.title and metric.unit and metric.summary and metric.form in FORMS and metric.gives in CHECKS
    assert metric.instead in ("", *METRICS) and (metric.narrow is None or metric.narrow in FORMS)


@pytest.mark.parametrize("key", METRICS)
def test_no_harm_where_nothing_changed(key, unharmed):
    metric, found = METRICS[key], METRICS[key](unharmed)
    if metric.harmless is not None:
        assert plain(found) == metric.harmless
    elif key in REFERENCE:
        assert found == REFERENCE[key](unharmed)
    elif metric.gives == "deciles":
        assert all(row["value"] == 0 for row in found)
    elif metric.gives == "margins":
        assert found["difference"]["value"] == 0 and found["reference"] == found["quantized"]
    elif key.startswith("survival"):
        assert found == [1.0] * MATERIAL.max_tokens
    else:
        assert key == "first_divergence" and found["value"] == MATERIAL.max_tokens


@pytest.mark.parametrize("key", METRICS)
def test_is_finite_and_its_interval_holds_it(key, harmed):
    found = METRICS[key](harmed)
    assert CHECKS[METRICS[key].gives](found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    if isinstance(found, dict) and "low" in found:
        assert found["low"] <= found["value"] <= found["high"] and math.isfinite(found["value"])


@pytest.mark.parametrize("key", METRICS)
def test_is_deterministic(key, float_lm, harmed):
    again = read_both(float_lm, LocalLM(quantized("llama"), tokenizer()), ["w3"], MATERIAL, seed=0)["w3"]
    assert METRICS[key](again) == METRICS[key](harmed)


@pytest.mark.parametrize("key", METRICS)
def test_shows_everywhere(key, numbers):
    metric = METRICS[key]
    assert key in numbers["presets"]["w3"] and f"`presets.NAME.{key}`" in document()
    if "narrow" in metric.where:
        assert (metric.short or metric.title) in terminal_table(numbers)
        assert (metric.short or metric.title) in model_card("m", {"numbers": card_numbers(numbers)})
    if "page" in metric.where:
        assert f"<th>{metric.title}</th>" in page(run_of(numbers))


def test_a_narrow_table_and_a_page_show_something():
    assert len(chosen("narrow")) > 3 and set(chosen("narrow")) <= set(chosen("page"))


def test_the_description_holds_and_can_fail(numbers):
    assert problems(numbers) == []
    broken = json.loads(json.dumps(numbers))
    del broken["presets"]["w3"]["kl"]
    broken["presets"]["w3"]["top1"]["low"] = 2
    del broken["presets"]["w3"]["tasks"]["dialogue"]["flips"]
    assert len(problems(broken)) == 3


def test_the_document_is_the_table():
    """`python -m polybit.evals.schema > docs/eval-json.md` writes it again."""
    assert (Path(__file__).parents[2] / "docs" / "eval-json.md").read_text() == document()


def test_without_text_only_tasks(float_lm):
    found = compare(float_lm, float_lm, [None], EvalMaterial(None, (), MATERIAL.tasks))
    assert set(found) == {"reference", "presets"} and set(found["presets"][AS_LOADED]) == {"tasks"}
    assert problems(found) == [] and "dialogue" in terminal_table(found) and "KL" not in terminal_table(found)
    html = page(run_of(found))
    assert "<th>dialogue</th>" in html and "<svg" not in html


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_asked_and_scored(name):
    task = TASKS[name]
    assert task.correct in task.metrics and task.rates <= set(task.metrics) and task.max_tokens > 0


@pytest.mark.parametrize("name", SUITES)
def test_suites_have_a_flag_and_say_nothing_unasked(name):
    from polybit.core.parts import load
    from polybit.options.evaluate import EvalOptions

    suite = SUITES[name]
    assert suite.summary and name not in EvalOptions().suites and hasattr(EvalOptions(), suite.flag)
    assert suite.table is None or load(suite.table)({}) is None
    assert suite.measure is None or callable(load(suite.measure))


def card_numbers(numbers):
    return {
        "widths": [3],
        "layers": {},
        "stored_bits_per_weight": 3.4,
        "sizes": {"w3": {"bits_per_weight": 3.4, "bytes": 1000}},
        "left_in_float": [],
        "measured": numbers,
    }


def run_of(numbers):
    machine = {"processor": "cpu", "threads": 1, "python": "3", "torch": "2", "gpu": None}
    return {"verb": "eval", "config": {}, "numbers": numbers, "seconds": 1.0, "machine": machine}
