"""The tokenizer and the chat template inside a GGUF file."""

from __future__ import annotations

import json
import re
from typing import Any

from polybit.core.runtime import PolybitError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # llama.cpp's kinds of token
UNKNOWN = 2
SPLITS = {  # what the splitting expressions of a tokenizer begin with -> llama.cpp's name of the whole
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|": "qwen2",
}


def write_words(writer: Any, tokenizer: Any, config: Any) -> None:
    """Tokens, merges, special tokens and the chat template; refused where llama.cpp would cut texts otherwise."""
    if tokenizer is None:
        raise PolybitError("--to gguf puts the tokenizer into the file, and this checkpoint has none: add its files")
    described = described_by(tokenizer)
    model = described["model"]
    if model["type"] != "BPE":
        raise refused(f"is a {model['type']} model")
    tokens, kinds = listed_tokens(described, int(config.vocab_size))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores(tokens, merges))
        writer.add_add_space_prefix(prepends_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting(described))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for word in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{word}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{word}_token_id")(int(number))
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def described_by(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as tokenizer.json has it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused("has no tokenizer.json")
    return json.loads(backend.to_str())


def refused(why: str) -> PolybitError:
    """The sentence for a tokenizer that llama.cpp does not have."""
    return PolybitError(f"the tokenizer {why}, which --to gguf cannot write: use --to dense and convert_hf_to_gguf.py")


def listed_tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its kind; numbers without a token are named and marked unused."""
    tokens, kinds = [f"[PAD{n}]" for n in range(size)], [UNUSED] * size
    fallback, unknown = described["model"].get("byte_fallback"), described["model"].get("unk_token")
    for token, number in described["model"]["vocab"].items():
        if number < size:
            byte = fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            tokens[number], kinds[number] = token, BYTE if byte else NORMAL
    for added in described.get("added_tokens", ()):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
            if added["content"] == unknown:
                kinds[added["id"]] = UNKNOWN
    return tokens, kinds


def scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A score per token, the higher the earlier it is merged: what a SentencePiece model has instead of merges."""
    found: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        found.setdefault(merge.replace(" ", ""), -float(rank))
    return [found.get(token, -1e6 if len(token) == 1 else 0.0) for token in tokens]


def prepends_space(described: dict[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    said = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    return '"Prepend"' in said or '"prepend_scheme": "first"' in said or '"prepend_scheme": "always"' in said


def splitting(described: dict[str, Any]) -> str:
    """llama.cpp's name of the way a text is cut before merging."""
    step = described.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    kinds = [s.get("type") for s in steps]
    if described.get("normalizer") and described["normalizer"].get("type") != "NFC":
        raise refused("normalizes texts")
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            expression = steps[0].get("pattern", {}).get("Regex", "")
            for beginning, name in SPLITS.items():
                if expression.startswith(beginning):
                    return name
    raise refused(f"cuts texts by {', '.join(map(str, kinds))}")
