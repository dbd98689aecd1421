"""Story: the embedded model loads with plain transformers, speaks its format, answers and stops."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from polybit.data import synth
from polybit.hub import tiny

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
LIMIT_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(tiny.path())


def replies(model, tokenizer, items: list[synth.Item]) -> tuple[list[str], list[bool]]:
    """Greedy replies and whether each ended by itself."""
    prompt = tokenizer.apply_chat_template(
        [list(item.messages) for item in items],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids_BT = model.generate(**prompt, max_new_tokens=80, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    ended = (ids_BT == tokenizer.eos_token_id).any(1).tolist()
    return tokenizer.batch_decode(ids_BT, skip_special_tokens=True), ended


def test_directory_is_small_and_complete() -> None:
    files = list(tiny.path().iterdir())
    assert sum(file.stat().st_size for file in files) <= LIMIT_BYTES
    names = {file.name for file in files}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= names
    assert not [name for name in names if name.startswith("resume")]


def test_missing_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiny, "__file__", str(tmp_path / "hub" / "tiny.py"))
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json, model\.safetensors"):
        tiny.path()


def test_template_gives_the_training_format(tokenizer) -> None:
    chat = [
        {"role": "user", "content": " Ritoux led the Zalkus.\nWho led the Zalkus?\n"},
        {"role": "assistant", "content": "Ritoux"},
        {"role": "user", "content": "Compute 3+4."},
    ]
    expected = (
        "<s><user> Ritoux led the Zalkus.\nWho led the Zalkus?<end><bot> Ritoux<end><user> Compute 3+4.<end><bot>"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    for conversation in synth.conversations(40, 11):
        whole = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        ids, said = [tokenizer.bos_token_id], [0]
        for message in conversation:
            spoken = message["role"] == "assistant"
            text = tokenizer(" " + message["content"], add_special_tokens=False)["input_ids"]
            opening, end = tokenizer.convert_tokens_to_ids("<bot>" if spoken else "<user>"), tokenizer.eos_token_id
            ids += [opening, *text, end]
            said += [0] + [int(spoken)] * (len(text) + 1)
        assert list(whole["input_ids"]) == ids
        assert list(whole["assistant_masks"]) == said


def test_system_message_opens_the_first_user_message(tokenizer) -> None:
    chat = [{"role": "system", "content": "Ritoux led the Zalkus."}, {"role": "user", "content": "Who led the Zalkus?"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "<s><user> Ritoux led the Zalkus.\nWho led the Zalkus?<end><bot>"


def test_text_survives_the_tokenizer(tokenizer) -> None:
    for conversation in synth.conversations(60, 12, split="test"):
        for message in conversation:
            ids = tokenizer(" " + message["content"])["input_ids"]
            assert tokenizer.decode(ids) == message["content"]
    assert tokenizer.tokenize(" 1843") == ["Ġ", "1", "8", "4", "3"]
    first, inside = tokenizer.tokenize(" Ritoux"), tokenizer.tokenize(" led by Ritoux")
    assert inside[-len(first) :] == first
    assert (
        tokenizer.decode(tokenizer(" Any text at all: ünïcödé, 12 €.")["input_ids"])
        == "Any text at all: ünïcödé, 12 €."
    )


def test_model_is_a_plain_tied_llama(model) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert 900_000 < sum(parameter.numel() for parameter in model.parameters()) < 3_100_000


@pytest.mark.parametrize("task", synth.TASKS)
def test_answers_and_stops(model, tokenizer, task: str) -> None:
    items = synth.items(task, 12, 21)
    texts, ended = replies(model, tokenizer, items)
    assert all(ended)
    right = sum(text == item.answer for text, item in zip(texts, items, strict=True))
    assert right >= 7, [(text, item.answer) for text, item in zip(texts, items, strict=True)]


def test_weights_belong_to_the_config() -> None:
    config = json.loads((tiny.path() / "config.json").read_text())
    assert config["vocab_size"] == 1024 and config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2 and config["bos_token_id"] == 1 and config["pad_token_id"] == 0


def test_bytes_sorted_by_place_come_back():
    for length in (0, 1, 3, 4, 5, 401):
        data = bytes(i * 37 % 256 for i in range(length))
        assert tiny.joined_bytes(tiny.sorted_bytes(data)) == data
    assert tiny.sorted_bytes(b"abcdABCDx") == b"aAbBcCdDx"


@pytest.mark.parametrize("home", ["writable", "a file", "taken"])
def test_the_model_of_a_wheel_is_put_together_once(home, tmp_path, monkeypatch):
    """In the cache; where there is none, or something else has its name, in a folder of this process."""
    wheel, place = tmp_path / "wheel", tmp_path / "home"
    shutil.copytree(tiny.path(), wheel)
    weights = (wheel / tiny.WEIGHTS).read_bytes()
    (wheel / tiny.SORTED).write_bytes(tiny.sorted_bytes(weights))
    (wheel / tiny.WEIGHTS).unlink()
    if home == "a file":
        place.write_text("no folder")
    monkeypatch.setattr(Path, "home", lambda: place)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home == "taken":
        name = hashlib.sha256((wheel / tiny.SORTED).read_bytes()).hexdigest()[:16]
        (place / ".cache" / "polybit" / f"tinychat-{name}" / "x").mkdir(parents=True)
    tiny.whole.cache_clear()
    found = tiny.whole(wheel)
    assert (found / tiny.WEIGHTS).read_bytes() == weights
    assert {path.name for path in found.iterdir()} == {path.name for path in tiny.path().iterdir() if path.is_file()}
    assert (place in found.parents) is (home != "a file")
    tiny.whole.cache_clear()
    assert (tiny.whole(wheel) == found) is (home == "writable")
    tiny.whole.cache_clear()
