"""Edits without a gradient: typing errors and changed words, the worst of several for the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

from polybit.data.squad import Answer, Asked
from polybit.robust.table import ATTACKS


def edit_characters(word: str, rng: Random) -> str:
    """One typing error: two neighbours change places, or a letter is lost, doubled or replaced."""
    if len(word) < 2:
        return word
    at = rng.randrange(len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :]


def edit_word(word: str, rng: Random) -> str:
    """One word is lost, doubled or turned round."""
    return ("", f"{word} {word}", word[::-1])[rng.randrange(3)]


def edited(one: Asked, answers: Iterable[Answer], kind: str, *, count: int, rng: Random) -> Asked:
    """The question with `count` words of its text edited, none of them a word of the question or of an answer.

    kind: name of an attack on words.
    """
    kept = {w.lower() for text in (one.question, *(a.text for a in answers)) for w in re.findall(r"\w+", text)}
    spans = [m.span() for m in re.finditer(r"\w+", one.context) if m.group().lower() not in kept]
    context = one.context
    for start, stop in sorted(rng.sample(spans, min(count, len(spans))), reverse=True):
        context = context[:start] + ATTACKS[kind](context[start:stop], rng) + context[stop:]
    return Asked(one.id, context, one.question)


def worst_edits(
    loss: Callable[[Sequence[Asked]], Sequence[float]],
    asked: Sequence[Asked],
    answers: Mapping[str, Sequence[Answer]],
    kind: str,
    *,
    count: int = 2,
    tries: int = 16,
    seed: int = 0,
) -> list[Asked]:
    """Of the unedited question and `tries` random edits of it, the one with the highest loss, for each question."""
    rng = Random(f"{kind} {seed}")
    versions = [
        [one, *(edited(one, answers[one.id], kind, count=count, rng=rng) for _ in range(tries))] for one in asked
    ]
    losses = list(loss([version for row in versions for version in row]))
    found = []
    for n, row in enumerate(versions):
        own = losses[n * (tries + 1) : (n + 1) * (tries + 1)]
        found.append(row[max(range(len(own)), key=own.__getitem__)])
    return found
