"""Alignment on a page: rows of one text only, every part from its own JSON, honest about what is missing."""

import copy
import re

import pytest

from polybit.core.runtime import PolybitError
from polybit.report import plots
from polybit.report.alignment import fewer, marked, merge, parts, side_by_side
from polybit.report.html import page, parts_page
from tests.report.test_report import e, evaluation, preset  # noqa: F401 - a fixture


@pytest.fixture
def runs(evaluation):  # noqa: F811
    before, after = copy.deepcopy(evaluation), copy.deepcopy(evaluation)
    after["command"], before["command"] = "polybit eval kd", "polybit eval rtn"
    for run, kl, top1, word in ((before, 0.4, 0.7, " goat"), (after, 0.1, 0.9, " coat")):
        row = {**preset(3.4, kl, top1), "identical": e(top1)}
        row["answers"][0]["tokens_quantized"][1] = word
        run["numbers"]["presets"] = {"w3": row}
    after["numbers"]["choices"] = {
        "csqa": {"n": 5, "chance": 0.2, "reference": {"acc": e(0.6)}, "presets": {"w3": {"acc": choice(0.5)}}}
    }
    arms = {key: {"damage": e(0.3), "tail_nats": e(-1.0, 0.1)} for key in ("float", "forced_flip", "continuation")}
    arms["quantized"] = arms["float"]
    after["numbers"]["presets"]["w3"]["breakdown"] = {"n": 7, "arms": arms, "forced_minus_continuation": e(0.04)}
    return {"RTN": before, "KD": after}


def choice(value):
    return {**e(value), **{key: e(0.1) for key in ("difference", "flips", "correct_to_wrong", "wrong_to_correct")}}


@pytest.fixture
def judge():
    games = {"win": e(0.5), "tie": e(0.3), "lose": e(0.2), "win_minus_lose": e(0.3)}
    pair = {**games, "consistent": e(0.9), "decided": 10, "unparsed": 2, "refused": 0, "unanswered": 0}
    close = {"exact": e(0.5), "prefix": e(0.6), "rouge_l": e(0.7), "nats": e(-0.4)}
    numbers = {
        "judge": {"model": "gpt"},
        "questions": {"n": 2, "sha256": ""},
        "baseline": "float",
        "fidelity_baseline": "RTN",
        "rows": {
            "float": {"closeness": close, "dropped": 0},
            "RTN": {"closeness": close, "pair": pair, "dropped": 0},
            "KD": {"closeness": close, "pair": pair, "fidelity": games, "dropped": 0},
        },
        "samples": [
            {
                "question": "1",
                "turns": ["Hi <b>?", "And?"],
                "answers": {"float": ["I am here.", "Yes"], "RTN": ["I am gone.", "Yes"], "KD": ["I am", "Yes"]},
            }
        ],
    }
    return {"verb": "judge", "numbers": numbers, "command": "polybit judge"}


@pytest.fixture
def align():
    def probe(flips, kl):
        return {"flips": flips, "kl": kl, "chosen": -1.0}

    presets = {"w3": {"before": probe(0.2, 0.5), "after": probe(0.1, 0.2)}}
    history = [
        {"step": 0, "presets": {"w3": probe(0.2, 0.5)}},
        {"step": 10, "presets": {"w3": probe(0.1, 0.2)}},
    ]
    numbers = {"presets": presets, "history": history, "kept": "step 10", "prompts": {"train": 90, "held_out": 10}}
    machine = {"processor": "cpu", "threads": 1, "python": "3", "torch": "2", "gpu": None}
    return {"verb": "align", "numbers": numbers, "command": "polybit align", "machine": machine, "seconds": 2.0}


def test_every_part_comes_from_its_own_json(runs, judge, align):
    titles = [part.title for part in parts(runs, judge, align)]
    assert titles == [
        "The training",
        "Before and after",
        "Margins",
        "Where tokens flip, and how long answers agree",
        "Measured on request, KD",
        "Judged answers",
        "Fidelity of the answers",
        "Conversations side by side",
    ]
    assert parts({"KD": runs["RTN"]}) == []
    assert [part.title for part in parts({}, None, align)] == ["The training"]


def test_rows_of_the_tables(runs, align):
    training, compared, margins, *_ = parts(runs, None, align)
    assert training.tables[0][2] == [["w3", "20.0 %", "10.0 %", "-50 %", "0.5", "0.2", "-60 %"]]
    header, rows = compared.tables[0][1:]
    assert [row[0] for row in rows] == ["float", "RTN", "KD"] and header[-1] == "csqa"
    assert {len(row) for row in rows} == {len(header)}
    assert [row[-1][:4] for row in rows] == ["60.0", "", "50.0"], "a set that one row was not asked stays empty there"
    assert [row[3][:3] for row in rows[1:]] == ["0.4", "0.1"]
    assert [row[0] for row in margins.tables[0][2]] == ["float", "RTN", "KD"]


def test_rows_measured_on_another_text_are_refused(runs):
    other = copy.deepcopy(runs)
    other["KD"]["numbers"]["reference"]["perplexity"] = e(9.0)
    with pytest.raises(PolybitError, match="another float model or text"):
        merge(other)
    other = copy.deepcopy(runs)
    other["KD"]["numbers"]["text"]["windows"] = 5
    with pytest.raises(PolybitError, match="same --reference, --text"):
        merge(other)


def test_several_widths_are_several_rows(runs):
    runs["KD"]["numbers"]["presets"]["w2"] = preset(2.4, 1.0, 0.4)
    assert list(merge(runs)) == ["RTN", "KD w3", "KD w2"]


def test_page_shows_both_answers_beside_the_float_one(runs, judge, align):
    after = runs["KD"]
    said = side_by_side(runs)
    assert [row["name"] for row in said[0]["rows"]] == ["float", "RTN", "KD"]
    html = page(after, parts=parts(runs, judge, align), said=said, others=[runs["RTN"], align, judge])
    assert "<mark>goat</mark>" in html and "<mark>coat</mark>" in html and "<mark>gone</mark>" in html
    assert "Hi &lt;b&gt;?" in html and "<b>?" not in html
    assert not re.search(r'(src|href)="(?!#)', html), "no link outwards"
    assert html.count("<h2>Margins</h2>") == 1, "the model's own figure gives way to the one with all rows"
    for command in ("polybit eval kd", "polybit eval rtn", "polybit align", "polybit judge"):
        assert f"<code>{command}</code>" in html
    assert "not quality" in html and "2 unparsed" in html


def test_page_without_an_evaluation(align):
    html = parts_page("m", parts({}, None, align), [align])
    assert "The training" in html and "What each width costs" not in html and "Answers side by side" not in html


def test_figures_count_what_they_show():
    picture = plots.outcome_bars({"KD": (0.5, 0.3, 0.2), "RTN": (0.97, 0.0, 0.03)})
    assert all(f">{share}<" in picture for share in (50, 30, 97)) and ">3<" not in picture
    assert plots.outcome_bars({}).startswith("<svg")


def test_words_are_marked_where_they_part():
    assert marked("x", "A b c", "A b c")["flipped"] is None
    assert marked("x", "A b c", "A b d e") == {"name": "x", "before": "A b ", "flipped": "d", "after": " e"}
    assert marked("x", "A b c", "A b")["flipped"] == "(ends here)"
    assert marked("x", "A b", "A b c")["flipped"] == "c"
    assert marked("x", "A", "")["flipped"] == "(ends here)"
    assert fewer(0.0, 0.1) == "–" and fewer(0.2, 0.05) == "-75 %"
