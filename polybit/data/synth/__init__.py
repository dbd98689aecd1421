"""Procedural text with ground truth: reading comprehension, arithmetic word problems and dialogue, without end.

`documents` is the stream a model trains or calibrates on, `items` are questions with their one right answer,
`conversations` are plain chat messages. Everything follows from the seed, on every machine. The test split uses names
that no training document contains, and in half of its items a wording or an object that training keeps apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Literal

from polybit.data.synth import arithmetic, dialogue, reading
from polybit.data.synth.names import is_held_out
from polybit.data.synth.records import Document, Item, Message, Turn, exchange
from polybit.data.table import EMBEDDED_TASKS

__all__ = [
    "MIX",
    "TASKS",
    "Document",
    "Item",
    "Message",
    "Split",
    "Turn",
    "conversations",
    "document",
    "documents",
    "is_held_out",
    "items",
]

Split = Literal["train", "test"]
TASKS = EMBEDDED_TASKS
MIX: Mapping[str, float] = {"reading": 1.0, "arithmetic": 1.0, "dialogue": 1.0, "drill": 0.3}
DRAW: Mapping[str, Callable[..., Document]] = {
    "reading": reading.document,
    "arithmetic": arithmetic.document,
    "dialogue": dialogue.document,
    "drill": arithmetic.drill,
    "contrast": reading.contrast,
}


def document(rng: Random, task: str, *, split: Split = "train", easy: bool = False) -> Document:
    """Draw one conversation of a task (reading, arithmetic, dialogue; drill, contrast)."""
    if task not in DRAW:
        raise ValueError(f"Task {task!r} is unknown; choose one of {', '.join(DRAW)}.")
    return DRAW[task](rng, held_out=_held_out(split), easy=easy)


def documents(
    seed: int, *, split: Split = "train", mix: Mapping[str, float] = MIX, easy: float = 0.0
) -> Iterator[Document]:
    """Endless stream; `mix` weighs the tasks by documents, `easy` is the share of short and simple ones."""
    rng = Random(seed)
    tasks, weights = list(mix), list(mix.values())
    while True:
        task = rng.choices(tasks, weights)[0]
        yield document(rng, task, split=split, easy=rng.random() < easy)


def conversations(n: int, seed: int, *, split: Split = "train") -> list[list[Message]]:
    """`n` whole conversations as chat messages, for calibration and for text to measure on."""
    stream = documents(seed, split=split)
    return [next(stream).messages for _ in range(n)]


def items(task: str, n: int, seed: int, split: Split = "test") -> list[Item]:
    """`n` questions of a task with their right answers; different seeds give different questions."""
    if task not in TASKS:
        raise ValueError(f"Task {task!r} has no items; choose one of {', '.join(TASKS)}.")
    rng = Random(f"{task} {split} {seed}")
    return [_item(rng, task, split, f"{task}-{split}-{seed}-{index}") for index in range(n)]


def _item(rng: Random, task: str, split: Split, name: str) -> Item:
    held_out = _held_out(split)
    if task == "dialogue":
        turns: tuple[Turn, ...] = ()
        while not any(turn.scored for turn in turns):
            turns = dialogue.document(rng, held_out=held_out).turns
        position = rng.choice([index for index, turn in enumerate(turns) if turn.scored])
    else:
        draw = reading.document if task == "reading" else arithmetic.document
        new_pairs = held_out and rng.random() < 0.5
        turns, position = draw(rng, held_out=held_out, new_pairs=new_pairs, turns=1).turns, 0
    turn = turns[position]
    prompt = (*exchange(turns[:position]), {"role": "user", "content": turn.user})
    return Item(name, task, prompt, turn.assistant, dict(turn.truth))


def _held_out(split: str) -> bool:
    if split not in ("train", "test"):
        raise ValueError(f"Split {split!r} is unknown; choose train or test.")
    return split == "test"
