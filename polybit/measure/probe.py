"""The text a sensitivity is read on, and which of its tokens count."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from polybit.core.runtime import PolybitError
from polybit.data.batches import buckets, pad

ROWS = 64  # tokens whose distributions are compared at once
LOGITS = 1 << 26  # numbers in the logits of one batch of windows, of which about four such tensors are there at once


@dataclass(frozen=True, slots=True)
class ProbeText:
    """Rows of token ids in batches [B, T], padded on the right, and which tokens are predicted and count, bool [B, T].

    One row is one item: a window of text, or a question with its answer. The first token of a row never counts,
    because nothing predicts it.
    """

    name: str
    ids: tuple[Tensor, ...]
    counted: tuple[Tensor, ...]

    @property
    def items(self) -> int:
        """Number of rows."""
        return sum(len(ids_BT) for ids_BT in self.ids)

    def digest(self) -> str:
        """Hex digest of tokens and marks."""
        digest = hashlib.sha256()
        for ids_BT, counted_BT in zip(self.ids, self.counted, strict=True):
            digest.update(repr(tuple(ids_BT.shape)).encode())
            digest.update(ids_BT.contiguous().numpy().tobytes())
            digest.update(counted_BT.contiguous().numpy().tobytes())
        return digest.hexdigest()


def text_probe(name: str, windows_NT: Tensor, *, batch: int = 4) -> ProbeText:
    """Windows of text in which every token but the first counts."""
    if not len(windows_NT):
        raise PolybitError(f"the text {name!r} gives 0 windows: give a longer text")
    counted_NT = torch.ones_like(windows_NT, dtype=torch.bool)
    counted_NT[:, 0] = False
    return ProbeText(name, tuple(windows_NT.split(batch)), tuple(counted_NT.split(batch)))


def answer_probe(
    name: str, rows: Sequence[tuple[Sequence[int], Sequence[bool]]], *, padding: int = 0, tokens: int = 2048
) -> ProbeText:
    """Questions with answers: per row its token ids and which of them the answer wrote; batches of up to `tokens`."""
    if not rows:
        raise PolybitError(f"the task {name!r} has 0 items: give at least one question with its answer")
    ids, counted = [], []
    for group in buckets([len(row) for row, _ in rows], tokens=tokens):
        ids_BT, _ = pad([rows[at][0] for at in group], padding, side="right")
        marks_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for line, at in enumerate(group):
            marks_BT[line, : len(rows[at][1])] = torch.tensor(rows[at][1], dtype=torch.bool)
        marks_BT[:, 0] = False
        ids.append(ids_BT)
        counted.append(marks_BT)
    empty = sum(int((~marks_BT.any(1)).sum()) for marks_BT in counted)
    if empty:
        raise PolybitError(
            f"{empty} of {len(rows)} items of the task {name!r} have no answer token to read a loss on: give every "
            "item an answer that fits the model's context"
        )
    return ProbeText(name, tuple(ids), tuple(counted))


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the counted tokens of each row of a batch, nats: KL(float || now) and the negative log-likelihood."""

    kl_B: Tensor
    nll_B: Tensor


def counted_log_probabilities(logits_BTV: Tensor, counted_BT: Tensor) -> Tensor:
    """Log-probabilities [N, V] in float32 where a counted token is predicted."""
    return log_softmax(logits_BTV[:, :-1][counted_BT[:, 1:].to(logits_BTV.device)].float(), -1)


def read_losses(now_NV: Tensor, float_NV: Tensor, ids_BT: Tensor, counted_BT: Tensor) -> Losses:
    """The losses of log-probabilities [N, V] at the counted tokens against the float model's."""
    marks_Bt = counted_BT[:, 1:].to(now_NV.device)
    row_N = torch.arange(len(marks_Bt), device=now_NV.device)[:, None].expand_as(marks_Bt)[marks_Bt]
    target_N = ids_BT[:, 1:].to(now_NV.device)[marks_Bt]
    parts = zip(float_NV.split(ROWS), now_NV.split(ROWS), strict=True)  # so that no third matrix of that size is made
    kl_N = torch.cat([(float_nV.exp() * (float_nV - now_nV)).sum(-1) for float_nV, now_nV in parts])
    nll_N = -now_NV.gather(1, target_N[:, None])[:, 0]
    zero_B = torch.zeros(len(marks_Bt), dtype=torch.float64)
    return Losses(
        zero_B.index_add(0, row_N.cpu(), kl_N.double().cpu()), zero_B.index_add(0, row_N.cpu(), nll_N.double().cpu())
    )
