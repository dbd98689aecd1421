"""Pairs: what the float and the quantized model answer to the same prompts, in files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError, atomic_path
from polybit.data.files import read_utf8
from polybit.hub.files import read_json
from polybit.hub.lm import LocalLM

SUMMARY = "pairs.json"
SHARDS = "shard-*.jsonl"
SCORES = "scores-*.safetensors"
LARGEST_TOKEN = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Pair:
    """Greedy answers to one prompt as token ids, EOS included where the model said it.

    chosen: the float model's · rejected: the quantized model's · star: index of the first token in which they differ
    (the length of the shorter one when it is a beginning of the other), None when they are the same.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    star: int | None

    @classmethod
    def of(cls, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Pair:
        """A pair with its first divergence."""
        return cls(list(prompt), list(chosen), list(rejected), first_divergence(chosen, rejected))

    def to_json(self) -> dict[str, Any]:
        """One line of a shard; the answer of an identical pair is written once."""
        return {
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": None if self.star is None else self.rejected,
            "star": self.star,
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> Pair:
        """The inverse of to_json; a damaged line is refused."""
        if not isinstance(value, dict) or not {"prompt", "chosen", "rejected", "star"} <= set(value):
            raise PolybitError(f"{where} is no pair of answers: make the pairs again with polybit pairs")
        rejected = value["chosen"] if value["rejected"] is None else value["rejected"]
        if not all(is_tokens(part) for part in (value["prompt"], value["chosen"], rejected)):
            raise PolybitError(f"{where} holds what are no lists of tokens: make the pairs again with polybit pairs")
        pair = cls.of(value["prompt"], value["chosen"], rejected)
        if pair.star != value["star"] or not pair.prompt or not pair.chosen:
            raise PolybitError(f"{where} contradicts itself: it was edited, make the pairs again with polybit pairs")
        return pair


def is_tokens(value: Any) -> bool:
    """Whether a JSON value is a list of token numbers."""
    return isinstance(value, list) and all(type(token) is int and 0 <= token <= LARGEST_TOKEN for token in value)


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, None when they are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


@dataclass(frozen=True, slots=True)
class Sifted:
    """Prompts that can be answered, as token ids in their order, and how many could not and why."""

    prompts: list[list[int]]
    empty: int
    duplicate: int
    too_long: int


def sift(encoded: Iterable[Sequence[int]], *, room: int | None) -> Sifted:
    """Leave out prompts without tokens, repeated ones, and those longer than `room` tokens.

    An over-long prompt is left out rather than cut: a conversation without its beginning is another one.
    """
    seen: set[tuple[int, ...]] = set()
    kept: list[list[int]] = []
    empty = duplicate = too_long = 0
    for row in encoded:
        key = tuple(row)
        if not key:
            empty += 1
        elif key in seen:
            duplicate += 1
        elif room is not None and len(key) > room:
            too_long += 1
        else:
            seen.add(key)
            kept.append(list(key))
    return Sifted(kept, empty, duplicate, too_long)


def answer_pairs(
    reference: Any, quantized: LocalLM | None, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Pair]:
    """Both models' greedy answers to token prompts, batched with a KV cache and sorted by length.

    reference: a LocalLM, or what else has its `generate_tokens` · quantized: None = it is not asked, and every answer
    stands for both
    """
    theirs = reference.generate_tokens(prompts, max_tokens=max_tokens, label="float answers")
    ours = theirs
    if quantized is not None:
        ours = quantized.generate_tokens(prompts, max_tokens=max_tokens, label="quantized answers")
    return [Pair.of(*row) for row in zip(prompts, theirs, ours, strict=True)]


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"shard-{number:05d}.jsonl"


def scores_name(number: int) -> str:
    """File of the reference's scores of a shard."""
    return f"scores-{number:05d}.safetensors"


def write_shard(path: Path, pairs: Sequence[Pair]) -> None:
    """Write one shard atomically."""
    with atomic_path(path) as staged:
        staged.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in pairs), encoding="utf-8")


def read_shard(path: Path) -> Iterator[Pair]:
    """The pairs of one shard."""
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        where = f"Line {number} of {path}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PolybitError(
                f"{where} is not JSON ({error!s:.80}): make the pairs again with polybit pairs"
            ) from error
        yield Pair.from_json(value, where)


def read_pairs(directory: Path) -> list[Pair]:
    """Every pair of a finished directory, identical ones included (they still hold a float answer)."""
    summary(directory)
    return [pair for path in sorted(directory.glob(SHARDS)) for pair in read_shard(path)]


def summary(directory: Path) -> dict[str, Any]:
    """What `polybit pairs` noted about a directory it finished."""
    if not (directory / SUMMARY).is_file():
        raise PolybitError(f"{directory} holds no finished pairs: make them with polybit pairs MODEL --out {directory}")
    noted = read_json(directory / SUMMARY)
    if not isinstance(noted.get("precision"), str):
        raise PolybitError(f"{directory / SUMMARY} names no precision: make the pairs again with polybit pairs")
    return noted


def count(pairs: Iterable[Pair]) -> dict[str, Any]:
    """How many pairs, how many identical, and the mean first divergence of the others in tokens."""
    total = identical = shared = tokens = 0
    for pair in pairs:
        total += 1
        tokens += len(pair.chosen)
        identical += pair.star is None
        shared += pair.star or 0
    differing = total - identical
    return {
        "prompts": total,
        "pairs": differing,
        "identical": identical,
        "mean_first_divergence": shared / differing if differing else None,
        "mean_answer_tokens": tokens / total if total else 0.0,
    }


def digest_rows(pairs: Iterable[Pair]) -> str:
    """Digest of prompts and float answers, to know cached references by."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt, pair.chosen]).encode())
    return digest.hexdigest()
