"""Perplexity of one model on windows of text."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polybit.core.records import Estimate
from polybit.core.runtime import track
from polybit.evals.scoring import bootstrap, exponentiate
from polybit.hub.lm import LocalLM


@torch.no_grad()
def token_nll(lm: LocalLM, windows_NT: Tensor) -> NDArray[np.float32]:
    """Negative log-likelihood in nats of every token of every window but the first, float32 [N, T - 1]."""
    rows = lm.rows_per_batch(windows_NT.shape[1])
    parts = []
    for ids_BT in track(windows_NT.split(rows), "perplexity"):
        logits_BTV = lm.logits(ids_BT[:, :-1])
        target_BT = ids_BT[:, 1:].to(logits_BTV.device)
        parts.append(torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none").cpu())
    return torch.cat(parts).numpy()


def perplexity(lm: LocalLM, windows_NT: Tensor, *, seed: int = 0) -> Estimate:
    """exp(mean nats per token) over windows int64 [N, T]; the interval resamples whole windows."""
    nll_NT = token_nll(lm, windows_NT)
    return exponentiate(bootstrap(nll_NT.mean(axis=1), seed=seed))
