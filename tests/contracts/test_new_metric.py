"""A new metric is one function and one line in a table: the terminal, the JSON, the card and the page show it."""

import json

import pytest

from polybit.cli import main
from polybit.evals.schema import document, problems
from polybit.evals.table import METRICS, Metric
from tests.commands.conftest import tiny_llama  # noqa: F401 - a fixture

FILE = '''"""Throw-away: the worst token."""


def worst_token(seen):
    return float(seen.text.quantized.kl_N.max())
'''
LINE = Metric("worst token, nats", "nats", "throw_away_metric:worst_token", "largest KL of a token", gives="number")


@pytest.fixture
def new_metric(tmp_path, monkeypatch):
    (tmp_path / "throw_away_metric.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METRICS, "worst_token", LINE)


def test_a_new_metric_is_seen_everywhere(new_metric, tiny_llama, tmp_path, capsys):  # noqa: F811
    out, numbers, html = tmp_path / "model", tmp_path / "eval.json", tmp_path / "page.html"
    main(["quantize", str(tiny_llama), "--out", str(out), "--method", "rtn", "--bits", "3", "--samples", "4",
          "--window", "32", "--calibration", "embedded"])  # fmt: skip
    card = (out / "README.md").read_text()
    assert LINE.title in card and LINE.title in capsys.readouterr().out
    main(["eval", str(out), "--text", "embedded-test", "--windows", "2", "--window", "32", "--answers", "2",
          "--max-tokens", "6", "--json", str(numbers)])  # fmt: skip
    printed = capsys.readouterr().out
    found = json.loads(numbers.read_text())["numbers"]
    worst = found["presets"]["w3"]["worst_token"]
    assert worst >= found["presets"]["w3"]["kl_p999"] and problems(found) == []
    assert LINE.title in printed and f"{worst:.3g}" in printed and "worst_token" in document()
    main(["report", str(out), "--eval", str(numbers), "--out", str(html)])
    assert f"<th>{LINE.title}</th>" in html.read_text() and f"<td>{worst:.3g}</td>" in html.read_text()
    main(["report", str(out), "--eval", str(numbers), "--before", f"A={numbers}", "--out", str(html)])
    assert html.read_text().count(f"<th>{LINE.title}</th>") == 2, "the table before and after shows it too"
