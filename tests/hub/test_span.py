"""A span head learns where answers are, answers at any precision, and refuses a model that has none."""

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.data import synth
from polybit.data.spans import span_targets, span_windows
from polybit.data.squad import write_squad
from polybit.evals.squad import run, spans
from polybit.hub.checkpoint import save
from polybit.hub.models import resolve
from polybit.hub.span import SpanReader, load_span
from polybit.nn.convert import convert
from polybit.nn.switch import use
from tests.families import quantize


@pytest.fixture(scope="module")
def trained():
    """The embedded model with a span head, trained until it knows 12 questions by heart."""
    items = synth.items("reading", 12, 3)
    torch.manual_seed(0)
    model, tokenizer = load_span(resolve("tinychat"), new_head=True)
    return model, tokenizer, items


@pytest.mark.slow
def test_a_span_head_learns_and_answers(trained, tmp_path):
    model, tokenizer, items = trained
    file = write_squad(tmp_path / "r.json", items)
    asked, answers = file.questions(), file.answers()
    windows = span_windows(tokenizer, asked)
    targets = torch.tensor(span_targets(windows, asked, answers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        for window, (start, end) in zip(windows, targets, strict=True):
            out = model(torch.tensor([window.ids]), start_positions=start[None], end_positions=end[None])
            out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    reader = SpanReader(model, tokenizer)
    scores = run(spans(reader), asked, file, tmp_path / "p.json")
    assert scores["em"].mean() > 0.8
    convert(model, quantize(model))
    for preset, least in (("w8", 0.8), ("w2", 0.0)):
        with reader.at(preset):
            assert run(spans(reader), asked, file, tmp_path / "p.json")["em"].mean() >= least


def test_batches_change_no_score(trained):
    model, tokenizer, items = trained
    rows = [tokenizer(item.messages[0]["content"])["input_ids"] for item in items]
    together = SpanReader(model, tokenizer).scores(rows)
    alone = SpanReader(model, tokenizer, batch_tokens=1).scores(rows)
    for (a, b), (c, d), row in zip(together, alone, rows, strict=True):
        assert len(a) == len(row)
        assert torch.allclose(a, c, atol=1e-4) and torch.allclose(b, d, atol=1e-4)


def test_nothing_is_said_when_the_null_score_wins(trained, tmp_path):
    model, tokenizer, items = trained
    asked = write_squad(tmp_path / "r.json", items).questions()
    reader = SpanReader(model, tokenizer)
    assert all(spans(reader)(asked))
    assert not any(spans(reader, null_threshold=-1e9)(asked))
    assert all(spans(reader, null_threshold=1e9)(asked))


def test_a_model_without_a_head_is_refused(tmp_path):
    with pytest.raises(PolybitError, match="no span head"):
        load_span(resolve("tinychat"))
    with pytest.raises(PolybitError, match="no directory"):
        load_span(str(tmp_path / "none" / "x"))


def test_a_span_model_is_kept_as_a_checkpoint(trained, tmp_path):
    model, tokenizer = load_span(resolve("tinychat"), new_head=True)
    convert(model, quantize(model))
    save(model, tmp_path / "qa", tokenizer=tokenizer)
    loaded, _ = load_span(tmp_path / "qa")
    ids = torch.tensor([[1, 5, 9, 30]])
    for preset in ("w8", "w3"):
        use(model, preset), use(loaded, preset)
        with torch.no_grad():
            # a loaded model multiplies with 16-bit inputs
            torch.testing.assert_close(model(ids).start_logits, loaded(ids).start_logits, atol=5e-4, rtol=1e-3)
