"""Text in: documents from a file, a named set or a dataset id, one stream of tokens, windows of equal length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.data.files import (
    NAMED,
    Row,
    dataset_rows,
    form_of,
    is_saved,
    numbered,
    read_file,
    reason_of,
    saved_rows,
    whole,
)
from polybit.data.stream import token_stream
from polybit.data.table import EMBEDDED_SETS, HUB_SETS
from polybit.data.turns import Messages, documents_of, plain_text

Render = Callable[[Messages], str]

EMBEDDED_CONVERSATIONS = 800
HUB_DOCUMENTS = 4000
SHINGLE_WORDS, DUPLICATE_SHARE, SHINGLE_LIMIT = 5, 0.8, 1_000_000


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents ready to tokenize, what stands between two of them, and warnings for the caller to show."""

    documents: list[str]
    separator: str = "\n"
    warnings: list[str] = field(default_factory=list)


def read_documents(source: str | Path) -> list[str]:
    """Read the documents of a file, a named set or a dataset id; see `read_corpus`."""
    return read_corpus(source).documents


def read_corpus(source: str | Path, tokenizer: Any = None) -> Corpus:
    """Read text to calibrate or to measure on: a file, a named set, or `owner/dataset[:config[:split]]`.

    .txt is split at <|endoftext|>. A row of .jsonl, .json, .csv, .tsv or .parquet (also packed as .gz, .bz2, .xz) is
    {"text"}, a conversation under "messages" or "conversations", or a pair such as {"prompt", "response"}.
    Conversations are rendered with the tokenizer's chat template when it has one; otherwise
    their contents are joined by newlines. Raises PolybitError for what cannot be used, with the reason.
    """
    render = renderer(tokenizer)
    raw = _read_source(str(source), Path(source))
    is_chat = any(not isinstance(document, str) for document in raw)
    documents = [collapse(document) if isinstance(document, str) else render(document) for document in raw]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise PolybitError(f"Text {str(source)!r} is empty; give {NAMED} with at least one document.")
    warning = duplicate_warning(documents, str(source))
    templated = is_chat and has_chat_template(tokenizer)
    return Corpus(documents, "" if templated else "\n", [warning] if warning else [])


def read_raw(source: str | Path) -> list[str | Messages]:
    """The documents of a source as they are written: texts, and conversations as messages."""
    return _read_source(str(source), Path(source))


def collapse(text: str) -> str:
    """Blank lines and <|endoftext|> become one newline; blanks at the ends of lines are dropped, indentation stays."""
    lines = (line.rstrip() for line in text.replace("<|endoftext|>", "\n").split("\n"))
    return "\n".join(line for line in lines if line)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether this tokenizer knows how to write a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


def renderer(tokenizer: Any = None) -> Render:
    """A function messages -> text: the tokenizer's chat template, or the contents one per line."""
    if has_chat_template(tokenizer):
        return lambda messages: in_template(tokenizer, messages)
    return plain_text


def in_template(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """A conversation as the tokenizer's chat template writes it; what the template refuses is said in one sentence."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program: it may raise anything
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise PolybitError(
            f"The model's chat template cannot write a conversation of {roles} ({reason_of(error)}); "
            "leave such conversations out, or give plain text."
        ) from error


def windows(ids: Tensor, length: int, *, bos: int | None, count: int | None = None, seed: int | None = None) -> Tensor:
    """Cut a stream into non-overlapping windows of `length` tokens, int64 [N, length], each BOS + length - 1 tokens.

    Without a BOS token (`bos=None`) a window is `length` tokens of the stream. `count` keeps the first `count` windows,
    or with a `seed` draws that many at random without repetition; where the text holds fewer, all of them are returned.
    """
    if length < 2:
        raise PolybitError(f"Window length {length} is too short; a window needs at least 2 tokens.")
    if count is not None and count < 1:
        raise PolybitError(f"{count} windows were asked for; ask for at least 1.")
    step = length if bos is None else length - 1
    total = ids.numel() // step
    if not total:
        raise PolybitError(
            f"The text has {ids.numel()} tokens but one window of {length} needs {step}; "
            "give a longer text or a shorter window."
        )
    cut_NT = ids[: total * step].reshape(total, step)
    if count is not None and count < total:
        if seed is None:
            cut_NT = cut_NT[:count]
        else:
            cut_NT = cut_NT[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]]
    if bos is None:
        return cut_NT.clone()
    return torch.cat([torch.full((len(cut_NT), 1), bos, dtype=torch.int64), cut_NT], dim=1)


def read_windows(
    source: str | Path, tokenizer: Any, length: int, *, count: int | None = None, seed: int | None = None
) -> tuple[Tensor, list[str]]:
    """Windows [N, length] of a source in one call, and the warnings to show."""
    corpus = read_corpus(source, tokenizer)
    ids = token_stream(tokenizer, corpus.documents, separator=corpus.separator)
    return windows(ids, length, bos=tokenizer.bos_token_id, count=count, seed=seed), corpus.warnings


def duplicate_warning(documents: Sequence[str], name: str) -> str | None:
    """Refuse a text that is one document over and over; name the share of near-duplicates when it is large.

    A document counts as a near-duplicate when four fifths of its runs of five words (case and digits ignored) stood in
    earlier documents. A single document is judged by its lines. Only the first million runs are looked at.
    """
    parts = list(documents) if len(documents) > 1 else [line for line in documents[0].splitlines() if line.strip()]
    if len(parts) < 3:
        return None
    if len({part.strip() for part in parts}) == 1:
        raise PolybitError(
            f"Text {name!r} repeats one document {len(parts)} times and nothing else; give varied text, "
            "because statistics of one sentence say nothing about the others."
        )
    seen: set[int] = set()
    repeated = looked = 0
    for part in parts:
        words = re.sub(r"\d+", "0", part.lower()).split()
        runs = {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        repeated += len(runs & seen) >= DUPLICATE_SHARE * len(runs)
        looked += 1
        seen |= runs
        if len(seen) > SHINGLE_LIMIT:
            break
    if repeated < 0.2 * looked:
        return None
    kind = "documents" if len(documents) > 1 else "lines"
    return f"{repeated} of {looked} {kind} in {name!r} nearly repeat earlier ones; its effective size is smaller."


def _read_source(name: str, path: Path) -> list[str | Messages]:
    if name in EMBEDDED_SETS:
        from polybit.data import synth

        part, seed = EMBEDDED_SETS[name]
        return list(synth.conversations(EMBEDDED_CONVERSATIONS, seed, split=part))
    if name in HUB_SETS:
        return _read_dataset(*HUB_SETS[name])
    if path.is_dir() and is_saved(path):
        return documents_in(whole([*numbered(saved_rows(path, limit=HUB_DOCUMENTS), "Row", name)]))
    if path.is_dir():
        raise PolybitError(f"Text {name!r} is a directory; give {NAMED}.")
    if path.exists():
        rows = read_file(path)
        return _split_text(rows[0][1]) if form_of(path) == "text" else documents_in(rows)
    identifier = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?", name)
    if identifier and form_of(path) is None and not path.parent.is_dir():
        dataset, config, split = identifier.groups()
        return _read_dataset(dataset, config, split or "train")
    raise PolybitError(
        f"Text {name!r} does not exist; give {NAMED}, a dataset id (owner/name:config:split), "
        f"or one of {', '.join([*EMBEDDED_SETS, *HUB_SETS])}."
    )


def documents_in(rows: Iterable[Row]) -> list[str | Messages]:
    """What the rows hold to read."""
    return [document for where, row in rows for document in documents_of(row, where)]


def _split_text(text: str) -> list[str | Messages]:
    return [part for part in text.split("<|endoftext|>") if part.strip()]


def _read_dataset(dataset: str, config: str | None, split: str) -> list[str | Messages]:
    rows = dataset_rows(dataset, config, split, limit=HUB_DOCUMENTS)
    return documents_in(whole([(f"A row of {dataset!r}", row) for row in rows]))
