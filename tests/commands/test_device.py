"""--device: every verb that runs a model takes it, refuses a GPU that is not there, and moves what it loads."""

import pytest
import torch

from polybit.cli import main
from polybit.hub import models


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "words",
    [
        ["eval", "tinychat"],
        ["judge", "tinychat", "--questions", "QUESTIONS", "--out", "OUT"],
        ["attack", "tinychat"],
        ["route", "tinychat", "--prompts", "PROMPTS"],
        ["align", "tinychat", "--prompts", "PROMPTS", "--precision", "w2", "--out", "OUT"],
        ["serve", "tinychat", "--port", "0"],
        ["generate", "tinychat", "--prompt", "Hello"],
        ["quantize", "tinychat", "--out", "OUT"],
        ["allocate", "tinychat", "--bits", "4", "--out", "OUT"],
        ["mix", "tinychat", "--general", "PROMPTS", "--tasks", "QUESTIONS"],
        ["columns", "tinychat", "--bits", "4", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_a_gpu_that_is_not_there_is_refused(words, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "x", "turns": ["Hello?"]}\n')
    (tmp_path / "p.txt").write_text("Hello?\nWho are you?\n")
    places = {"PROMPTS": str(tmp_path / "p.txt"), "QUESTIONS": str(tmp_path / "q.jsonl"), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stop:
        main([places.get(word, word) for word in words] + ["--device", "cuda"])
    assert stop.value.code == 2 and "torch sees no GPU here" in capsys.readouterr().err


def test_models_are_moved_where_they_are_asked_to(monkeypatch, tiny_llama):
    """The meta device stands for a GPU: it is another place, and torch has it everywhere."""
    monkeypatch.setattr(models, "device_of", lambda name: torch.device("meta" if name == "cuda" else "cpu"))
    model, _ = models.open_model(str(tiny_llama), device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
