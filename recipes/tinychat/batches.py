"""Training batches of the embedded model: generated documents, encoded, sorted by length, one document per row.

Chunk number k depends on the seed, k and the share of training done when it began, and on nothing else, so a run can be
taken up again at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from polybit.data import synth

PAD, BEGIN, END, USER, BOT = range(5)
CHUNK_DOCUMENTS = 1_500
LONGEST = 320


@dataclass(frozen=True)
class Batch:
    """ids_BT padded on the right; role_BT is 0 on padding, 1 on what the model reads, 2 on what it has to say."""

    ids_BT: Tensor
    role_BT: Tensor
    tokens: int


Encoded = tuple[list[int], list[int]]


def mix_at(done: float) -> dict[str, float]:
    """Weights of the tasks, by documents, when a share `done` of the training is over."""
    if done < 0.06:
        return {"reading": 2.0, "arithmetic": 0.4, "dialogue": 1.0, "drill": 1.0}
    if done < 0.45:
        return {"reading": 1.0, "arithmetic": 1.2, "dialogue": 1.1, "drill": 1.2}
    if done < 0.53:  # finding the right subject: learnt only when it is most of what there is to learn
        return {"contrast": 8.0, "reading": 0.6, "arithmetic": 0.6, "dialogue": 0.6, "drill": 0.2}
    if done < 0.55:
        return {"contrast": 2.0, "reading": 1.5, "arithmetic": 1.0, "dialogue": 1.0, "drill": 0.5}
    if done < 0.8:
        return {"contrast": 0.8, "reading": 1.4, "arithmetic": 1.7, "dialogue": 1.2, "drill": 1.0}
    return {"contrast": 0.8, "reading": 2.0, "arithmetic": 1.7, "dialogue": 1.4, "drill": 0.4}


def easy_at(done: float) -> float:
    """Share of easy documents: all at first, none after a tenth of the training."""
    return max(0.0, 1.0 - done / 0.1)


def encode(tokenizer: Tokenizer, conversations: Sequence[Sequence[synth.Message]]) -> list[Encoded]:
    """Token ids as the chat template gives them, with 2 on every token of an assistant and 1 on the others."""
    texts = [" " + message["content"] for conversation in conversations for message in conversation]
    pieces = iter(tokenizer.encode_batch(texts))
    out: list[Encoded] = []
    for conversation in conversations:
        ids, roles = [BEGIN], [1]
        for message in conversation:
            spoken = message["role"] == "assistant"
            piece = next(pieces).ids
            ids += [BOT if spoken else USER, *piece, END]
            roles += [1] + [2 if spoken else 1] * (len(piece) + 1)
        out.append((ids, roles))
    return out


def pad(encoded: Sequence[Encoded]) -> Batch:
    """Rows of one batch, padded to the longest."""
    longest = max(len(ids) for ids, _ in encoded)
    ids_BT = torch.full((len(encoded), longest), PAD)
    role_BT = torch.zeros(len(encoded), longest, dtype=torch.long)
    for row, (ids, roles) in enumerate(encoded):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        role_BT[row, : len(roles)] = torch.tensor(roles)
    return Batch(ids_BT, role_BT, sum(len(ids) for ids, _ in encoded))


def chunk(tokenizer: Tokenizer, seed: int, index: int, done: float, tokens: int) -> list[Batch]:
    """All batches of one chunk, each of at most `tokens` tokens with its padding, in random order."""
    rng = Random(f"tinychat {seed} {index}")
    mix, easy = mix_at(done), easy_at(done)
    tasks = rng.choices(list(mix), list(mix.values()), k=CHUNK_DOCUMENTS)
    drawn = [synth.document(rng, task, easy=rng.random() < easy).messages for task in tasks]
    encoded = sorted((row for row in encode(tokenizer, drawn) if len(row[0]) <= LONGEST), key=lambda row: len(row[0]))
    batches = [pad(rows) for rows in _fill(encoded, tokens)]
    rng.shuffle(batches)
    return batches


def _fill(encoded: list[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    rows: list[Encoded] = []
    for row in encoded:
        if rows and len(row[0]) * (len(rows) + 1) > tokens:
            yield rows
            rows = []
        rows.append(row)
    yield rows
