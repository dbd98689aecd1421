"""Report: numbers are spelled as people read them; the page is self-contained, escaped, and marks the flipped token."""

import json
import re

import pytest

from polybit.report import plots
from polybit.report.card import model_card
from polybit.report.html import answer_row, cost_table, page, verdict
from polybit.report.summary import markdown_table, terminal_table
from polybit.report.tables import aligned, estimate, markdown, number, percent, size


def e(value, spread=0.01, n=10):
    return {"value": value, "low": max(value - spread, 0), "high": value + spread, "n": n}


def preset(bits, kl, top1):
    deciles = [
        {"from": i / 10, "to": (i + 1) / 10, "value": (10 - i) / 40, "low": 0, "high": 1, "n": 9} for i in range(10)
    ]
    return {
        "bits_per_weight": bits,
        "bytes": 1000 * bits,
        "perplexity": e(5.0),
        "delta_nll": e(0.1),
        "kl": e(kl, kl / 10),
        "kl_p999": 20 * kl,
        "top1": e(top1),
        "flips_text": e(1 - top1),
        "flips": e(1 - top1),
        "margins": {
            "edges": [0, 0.5, 1],
            "reference": [2, 3],
            "quantized": [3, 2],
            "reference_mean": e(0.6),
            "quantized_mean": e(0.5),
            "difference": e(0.1),
        },
        "flips_by_margin_decile": deciles,
        "flips_by_entropy_decile": deciles[::-1],
        "first_divergence": e(7.0),
        "identical": e(0.2),
        "survival": [1.0, 0.5, 0.2],
        "tasks": {"reading": {"em": e(0.8), "f1": e(0.9), "difference": {}, "predictions_sha256": "ab"}},
        "answers": [
            {
                "prompt": "<script>alert(1)</script>",
                "reference": " red boat",
                "quantized": " red goat",
                "first_difference_token": 1,
                "tokens_reference": [" red", " boat"],
                "tokens_quantized": [" red", " goat"],
            }
        ],
    }


@pytest.fixture
def evaluation():
    numbers = {
        "reference": {"perplexity": e(4.5), "margin": e(0.6), "entropy": e(1.0), "tasks": {"reading": {"em": e(0.9)}}},
        "text": {"windows": 4, "window_tokens": 64, "tokens": 252},
        "prompts": {"n": 1, "max_tokens": 3},
        "presets": {"w8": preset(8.4, 0.0002, 0.999), "w4": preset(4.4, 0.02, 0.95), "w2": preset(2.4, 1.0, 0.4)},
    }
    config = {"target_name": "m", "reference_name": "float", "text_name": "t.txt"}
    machine = {"processor": "cpu", "threads": 1, "python": "3", "torch": "2", "gpu": None}
    return {"verb": "eval", "config": config, "numbers": numbers, "seconds": 3.0, "machine": machine}


def test_page_is_self_contained_and_escaped(evaluation):
    html = page(evaluation)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r'(src|href)="(?!#)', html), "no link outwards"
    assert html.count("<svg") == 6
    assert "<mark>goat</mark>" in html
    assert page(json.loads(json.dumps(evaluation))) == html, "the same numbers give the same bytes"


def test_page_without_prompts_tasks_or_sizes(evaluation):
    for row in evaluation["numbers"]["presets"].values():
        row.update(flips=None, first_divergence=None, survival=[], answers=[], tasks={})
        del row["bits_per_weight"], row["bytes"]
    evaluation["numbers"]["reference"]["tasks"] = {}
    html = page(evaluation)
    assert "Answers side by side" not in html and "Where tokens flip" in html


def test_verdict_names_the_narrowest_good_width(evaluation):
    assert "w8" in verdict(evaluation["numbers"])
    evaluation["numbers"]["presets"]["w4"]["top1"] = e(0.985)
    assert "w4" in verdict(evaluation["numbers"])
    for row in evaluation["numbers"]["presets"].values():
        row["top1"] = e(0.5)
    assert "No measured precision" in verdict(evaluation["numbers"])


@pytest.mark.parametrize("presets", [("plan",), ("w8", "plan", "w3"), ("w10", "w9")])
def test_bytes_per_layer_are_drawn_for_whatever_presets_there_are(presets):
    rows = [("up", {p: 1024 * (n + 1) for n, p in enumerate(presets)}), ("down", dict.fromkeys(presets, 4096))]
    drawn = plots.layer_bytes(rows)
    places = [drawn.index(f">{p}</text>") for p in presets]
    assert places == sorted(places), "the lightest first"


def test_tables_have_one_row_per_precision(evaluation):
    numbers = evaluation["numbers"]
    assert [row[0] for row in cost_table(numbers)["rows"]] == ["float", "w8", "w4", "w2"]
    assert len(markdown_table(numbers).splitlines()) == 2 + 4
    widths = {len(line) for line in terminal_table(numbers).splitlines()[:2]}
    assert len(widths) == 1


def test_answer_that_stops_early_marks_the_end():
    answer = {"first_difference_token": 2, "tokens_quantized": [" a", " b"], "quantized": " a b"}
    assert answer_row("w3", answer)["flipped"] == "(ends here)"


def test_card_has_the_front_matter_the_hub_reads(evaluation):
    numbers = {
        "widths": [8, 4],
        "layers": {"a": {}},
        "stored_bits_per_weight": 8.4,
        "sizes": {"w8": {"bits_per_weight": 8.4, "bytes": 1234}},
        "left_in_float": [{"name": "norm", "parameters": 3, "share": 0.1, "reason": "norm"}],
        "measured": evaluation["numbers"],
    }
    card = model_card("org/model", {"numbers": numbers, "command": "polybit quantize org/model"})
    front = card.split("---")[1]
    assert "base_model: org/model" in front and "base_model_relation: quantized" in front
    assert "| w4 |" in card and "polybit quantize org/model" in card


def test_numbers_as_people_read_them():
    assert [size(n) for n in (0, 999, 1000, 1_440_000, 3.1e9, 2e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.44 MB",
        "3.1 GB",
        "2 TB",
    ]
    assert [number(n) for n in (None, 0, 0.00001, 0.0388, 4.527, 12345)] == [
        "",
        "0",
        "1.0e-05",
        "0.0388",
        "4.53",
        "12,345",
    ]
    assert percent(0.1234) == "12.3 %"
    assert estimate(e(0.5, 0.1)) == "0.5 [0.4, 0.6]"
    assert markdown(["a"], [["1"]]) == "| a |\n|---|\n| 1 |"
    assert aligned(["name", "n"], [["x", "10"]]) == "name   n\n----  --\nx     10"


def test_figures_survive_empty_and_zero_data():
    assert plots.quality_against_bits([{"preset": "w8", "bits": 8, "kl": e(0.0)}]).startswith("<svg")
    assert plots.curves({}, "x", "y").startswith("<svg")
    assert plots.scores_against_bits({}, {}).startswith("<svg")
