"""Trajectory and oracle: the recipe resumes bit for bit, its network is transformers' Llama, its rounding is graded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from polybit.data import synth

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
RECIPE = Path(__file__).parents[2] / "recipes" / "tinychat"
MODULES = ("batches", "tokenizer", "network", "optimizer", "train", "evaluate")


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    """The recipe's modules, imported as its commands import them and forgotten afterwards."""
    sys.path.insert(0, str(RECIPE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(RECIPE))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(recipe):
    return recipe.tokenizer.train(count=300)


@pytest.fixture
def trainer(recipe, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recipe.batches, "CHUNK_DOCUMENTS", 12)
    shape = recipe.network.Shape(width=32, layers=2, heads=2, feed_forward=64)
    return lambda: recipe.train.Trainer(shape, tokenizer, total=100_000, batch_tokens=512, seed=3)


def test_resumed_run_equals_the_uninterrupted_one(recipe, trainer, tmp_path: Path) -> None:
    whole, first, second = trainer(), trainer(), trainer()
    recipe.train.run(whole, tmp_path, saves=1, stop_after=9)
    recipe.train.run(first, tmp_path, saves=1, stop_after=4)
    second.resume(tmp_path / "step-000004")
    recipe.train.run(second, tmp_path, saves=1, stop_after=9)
    assert second.position.tokens == whole.position.tokens and second.position.chunk == whole.position.chunk > 0
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name]), name


def test_conversion_gives_the_logits_of_transformers(recipe, trainer, tmp_path: Path) -> None:
    made = trainer()
    recipe.train.write_model(made.network, made.tokenizer, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids_BT = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_BT).logits, made.network(ids_BT), atol=1e-5, rtol=1e-5)
    again = recipe.evaluate.load(tmp_path / "model")
    assert all(torch.equal(value, made.network.state_dict()[name]) for name, value in again.state_dict().items())


def test_batches_are_the_chat_template(recipe, tokenizer, tmp_path: Path) -> None:
    recipe.tokenizer.write(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chats = synth.conversations(20, 5)
    for chat, (ids, roles) in zip(chats, recipe.batches.encode(tokenizer, chats), strict=True):
        shown = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert list(shown["input_ids"]) == ids
        assert list(shown["assistant_masks"]) == [int(role == 2) for role in roles]


def test_rounding_error_shrinks_with_every_bit(recipe) -> None:
    weight_OI = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    for group in (0, 32, 64):
        errors = [
            (recipe.evaluate.round_to_nearest(weight_OI, bits, group) - weight_OI).square().mean().item()
            for bits in range(2, 9)
        ]
        assert errors == sorted(errors, reverse=True)


def test_scorer_knows_right_from_wrong(recipe, trainer) -> None:
    made = trainer()
    data = recipe.evaluate.rows(made.tokenizer, synth.items("dialogue", 40, 1))
    checked = recipe.evaluate.controls(made.network, data)
    assert checked["right replies %"] == 100 and checked["shuffled replies %"] < 15
    record = recipe.evaluate.measure(
        made.network, data, [logp_NV for _, logp_NV in recipe.evaluate.log_probabilities(made.network, data)]
    )
    assert record["kl"] == 0 and record["flips %"] == 0 and record["dialogue"]["n"] == 40
    for part in data:
        for row, item in enumerate(part.items):
            said = part.ids_BT[row, 1:][part.said_BT[row]].tolist()
            assert said[-1] == recipe.batches.END
            assert made.tokenizer.decode(said) == item.answer
