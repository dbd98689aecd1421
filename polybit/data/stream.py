"""Text as one stream of token ids; a long one piece by piece, to the same ids.

A tokenizer needs more than a hundred times the memory of its ids while it works: 3 MB of text take 350. What it makes
of a text at one place hardly depends on what stands far away, so pieces that overlap agree on most of what they share,
and the stream goes over from one to the next where they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18  # characters
OVERLAP = 1 << 11  # characters that a piece shares with the one before
AGREED = 16  # tokens that both make on either side of where one goes over into the other


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids [T] of a piece of text, and the characters of the whole text they begin at [T]."""

    ids: Tensor
    begins: Tensor

    def around(self, at: int) -> tuple[Tensor, Tensor]:
        """Ids and beginnings of up to AGREED tokens before and after a place."""
        near = slice(max(at - AGREED, 0), at + AGREED)
        return self.ids[near], self.begins[near]


def token_stream(tokenizer: Any, documents: Sequence[str], *, separator: str = "\n") -> Tensor:
    """Tokenize all documents as ONE stream, int64 [T]; line by line would inflate perplexity by a fifth."""
    return encode(tokenizer, separator.join(documents))


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text as int64 [T], nothing added before or after."""
    if len(text) > PIECE and tokenizer.is_fast:  # others do not say where their tokens lie in the text
        ids = encode_in_pieces(tokenizer, text)
        if ids is not None:
            return ids
    return encode_at_once(tokenizer, text)


def encode_at_once(tokenizer: Any, text: str) -> Tensor:
    """The literal twin of `encode_in_pieces`."""
    # verbose=False: a long stream is meant to be longer than the model's window
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def encode_in_pieces(tokenizer: Any, text: str, *, piece: int = PIECE, overlap: int = OVERLAP) -> Tensor | None:
    """The ids of a text, a piece of it at a time; None where two pieces do not agree on what they share."""
    found: list[Tensor] = []
    last = encode_piece(tokenizer, text, 0, piece)
    for stop in range(piece, len(text), piece - overlap):
        following = encode_piece(tokenizer, text, stop - overlap, stop - overlap + piece)
        middle = stop - overlap // 2
        leaves, enters = (int(torch.searchsorted(part.begins, middle)) for part in (last, following))
        ours, theirs = last.around(leaves), following.around(enters)
        if len(ours[0]) < 2 * AGREED or not all(map(torch.equal, ours, theirs)):
            return None
        found.append(last.ids[:leaves])
        last = Encoded(following.ids[enters:], following.begins[enters:])
    return torch.cat([*found, last.ids])


def encode_piece(tokenizer: Any, text: str, start: int, stop: int) -> Encoded:
    """The tokens of text[start:stop], as if nothing stood around it."""
    made = tokenizer(text[start:stop], add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    begins = torch.tensor([start + begin for begin, _ in made["offset_mapping"]], dtype=torch.int64)
    return Encoded(torch.tensor(made["input_ids"], dtype=torch.int64), begins)
