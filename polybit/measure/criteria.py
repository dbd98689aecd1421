"""What makes a mixture of calibration texts good: its alignment with a target, alone or weighed against its rank."""

from __future__ import annotations

from torch import Tensor

DIVERSITY = 0.5  # λ of aligned_diverse: worth of the effective rank beside the alignment
LEAST_RANK = 0.9  # of rank_kept: share of the general text's effective rank a mixture must keep


def aligned(alignment_P: Tensor, rank_P: Tensor | None) -> Tensor:
    """The alignment alone."""
    return alignment_P


def aligned_diverse(alignment_P: Tensor, rank_P: Tensor | None) -> Tensor:
    """Alignment plus DIVERSITY times the relative effective rank."""
    assert rank_P is not None, "the traces were collected without effective ranks"
    return alignment_P + DIVERSITY * rank_P


def rank_kept(alignment_P: Tensor, rank_P: Tensor | None) -> Tensor:
    """The most aligned of the mixtures that keep LEAST_RANK of the rank."""
    assert rank_P is not None, "the traces were collected without effective ranks"
    # a cosine is at most 1: a mixture that lost too much rank comes after all that did not
    return alignment_P - 2.0 * (rank_P < LEAST_RANK)
