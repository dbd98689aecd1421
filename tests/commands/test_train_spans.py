"""Training a span head: the right places, padding out of reach, a checkpoint that answers."""

import json

import pytest
import torch

from polybit.cli import main
from polybit.core.runtime import PolybitError
from polybit.train.cascade import Cascade
from polybit.train.fit import Course
from polybit.train.spans import SpanRow, batch_of, pose, run_spans


def test_scores_are_classes_over_tokens():
    batch = batch_of([SpanRow([5, 6, 7], 1, 2), SpanRow([8, 9], 0, 1)], 0)
    part, target_N = pose(batch)
    assert target_N.tolist() == [1, 0, 2, 1] and part["ids_BT"].tolist() == [[5, 6, 7], [8, 9, 0]]
    logits_NT = torch.randn(4, 3)
    loss, _ = Cascade("joint", pose=pose)(lambda part, name: logits_NT, batch, ("A",))
    wanted = -sum(logits_NT[n].log_softmax(-1)[t] for n, t in enumerate(target_N)) / 4
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_rows_without_answers_are_refused(tmp_path):
    with pytest.raises(PolybitError, match="no window of the data holds an answer"):
        run_spans(torch.nn.Identity(), [SpanRow([5, 6], 0, 0)], [], None, ("A",), out=tmp_path, course=Course())


def test_a_span_checkpoint_is_trained_saved_and_read(tiny_llama, tmp_path):
    from polybit.hub.span import SpanReader, load_span

    out = tmp_path / "out"
    main(["train", str(tiny_llama), "--out", str(out), "--head", "span", "--presets", "A=w8,B=w4a8", "--rows", "24",
          "--steps", "6", "--batch", "4", "--probes", "2", "--group-size", "16", "--learning-rate", "1e-2", "--slack",
          "5", "--length", "120", "--json", str(tmp_path / "run.json")])  # fmt: skip
    numbers = json.loads((tmp_path / "run.json").read_text())["numbers"]
    assert set(numbers["presets"]) == {"A", "B"}
    reader = SpanReader(*load_span(out))
    with reader.at("A"):
        wide = reader.scores([[5, 6, 7, 8]])[0][0]
    with reader.at("B"):
        narrow = reader.scores([[5, 6, 7, 8]])[0][0]
    assert not torch.equal(wide, narrow)
