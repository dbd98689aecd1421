"""Which width a prompt needs, told from what is cheap to see of it: its tokens, their embeddings, and the first blocks.

A router is a linear model per width of the logarithm of the harm, fitted by `polybit route` and kept as router.json in
the checkpoint. It asks for the width with the least  harm + price * bits;  the price is what meets the budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polybit.core.runtime import PolybitError, atomic_path, sha256_file
from polybit.hub.directory import MANIFEST
from polybit.hub.files import read_json

Array = NDArray[np.float64]
ROUTER = "router.json"
VERSION = 2
COMPONENTS = 12  # directions of the embedding that are looked at
CLASSES = ("digits", "capitals", "marks", "beginnings", "other letters")
FEATURES = ("log length", "share of different tokens", *CLASSES)
MOST = 4096  # features, widths: more is no router of ours
SMALL = 1e-6  # nats added before the logarithm


class PromptFeatures:
    """Features of prompts: length, variety, kinds of tokens, the mean embedding along its main directions, and what the
    first blocks make of the prompt along those directions in which prompts differ most (states_EK; none: not read)."""

    def __init__(
        self,
        tokenizer: Any,
        embedding_VD: Tensor,
        basis_DK: Array,
        first_blocks: Callable[[Sequence[int]], Array] | None = None,
        states_EK: Array | None = None,
    ) -> None:
        self.first_blocks, self.states_EK = first_blocks, states_EK
        projected_VK = embedding_VD.double().numpy() @ basis_DK
        count = len(embedding_VD)
        self.table_VF = np.concatenate([classes_of(tokenizer, count), projected_VK], axis=1)

    def __call__(self, tokens: Sequence[int]) -> Array:
        """Features [F] of one prompt."""
        ids = np.asarray(tokens, dtype=np.int64)
        found = [np.array([math.log(len(ids)), len(np.unique(ids)) / len(ids)]), self.table_VF[ids].mean(0)]
        if self.first_blocks is not None and self.states_EK is not None and self.states_EK.size:
            found.append(self.first_blocks(tokens) @ self.states_EK)
        return np.concatenate(found)


def classes_of(tokenizer: Any, count: int) -> Array:
    """Which kinds of text a token is, [V, 5], 0 or 1."""
    rows = np.zeros((count, len(CLASSES)))
    for token, text in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(count, len(tokenizer)))))):
        plain = (text or "").lstrip("Ġ▁ ")
        rows[token] = (
            any(c.isdigit() for c in plain),
            any(c.isupper() for c in plain),
            bool(plain) and not any(c.isalnum() for c in plain),
            plain != (text or ""),
            any(ord(c) > 127 for c in plain),
        )
    return rows


def main_directions(embedding_VD: Tensor, count: int = COMPONENTS) -> Array:
    """The `count` main directions of an embedding, [D, K]."""
    centred = embedding_VD.double() - embedding_VD.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, values.argsort(descending=True)[:count]].numpy()


def embedding_of(model: nn.Module) -> Tensor:
    """The token embedding, float32 [V, D], decoded where it is quantized."""
    module: Any = model.get_input_embeddings()  # type: ignore[operator]
    found = module.decode() if hasattr(module, "decode") else module.weight
    return found.detach().float().cpu()


@dataclass(frozen=True)
class Router:
    """A fitted router; its directions are those of PromptFeatures.

    widths: names, widest first, with their bits · coefficients [W, F + 1]: log harm of each width, constant last, of
    features less `mean` over `spread` · price: nats per bit · margins: of a gate in nats, by "low:high" (gate_fit).
    """

    widths: tuple[str, ...]
    bits: Array
    mean_F: Array
    spread_F: Array
    coefficients_WF: Array
    basis_DK: Array
    states_EK: Array
    price: float
    budget: float
    margins: Mapping[str, float] = field(default_factory=dict)

    def harms(self, features_NF: Array) -> Array:
        """Expected harm of every width for every prompt, nats per token [N, W]."""
        scaled = (np.atleast_2d(features_NF) - self.mean_F) / self.spread_F
        logs = scaled @ self.coefficients_WF[:, :-1].T + self.coefficients_WF[:, -1]
        return np.exp(np.clip(logs, -40, 10))

    def choose(self, features_F: Array) -> str:
        """The width for a prompt."""
        return self.widths[int(np.argmin(self.harms(features_F)[0] + self.price * self.bits))]

    def to_json(self, checkpoint: str) -> dict[str, Any]:
        """The content of router.json; checkpoint: digest of what it was fitted to."""
        return {
            "version": VERSION,
            "checkpoint": checkpoint,
            "widths": list(self.widths),
            "bits": self.bits.tolist(),
            "mean": self.mean_F.tolist(),
            "spread": self.spread_F.tolist(),
            "coefficients": self.coefficients_WF.tolist(),
            "basis": self.basis_DK.tolist(),
            "states": self.states_EK.tolist(),
            "price": self.price,
            "budget": self.budget,
            "margins": dict(self.margins),
        }


def checkpoint_digest(directory: Path) -> str:
    """What a router is bound to: the manifest, which lists every file of the checkpoint with its sha256."""
    return sha256_file(directory / MANIFEST)


def read_router(directory: Path, widths: Sequence[str], embedding_size: int) -> Router | None:
    """The router of a checkpoint, None where there is none; refused when it is damaged or of another checkpoint."""
    path = directory / ROUTER
    if not path.is_file() or not (directory / MANIFEST).is_file():
        return None
    value = read_json(path)
    again = "fit it again with polybit route, or remove it"
    try:
        if value.get("version") != VERSION:
            raise ValueError(f"version {value.get('version')!r:.20}")
        made_for = str(value["checkpoint"])
        found = parsed(value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise PolybitError(f"{path} is no router ({error!s:.100}): {again}") from None
    if made_for != checkpoint_digest(directory):
        raise PolybitError(f"{path} was fitted to another checkpoint: {again}")
    if len(found.basis_DK) != embedding_size:
        raise PolybitError(
            f"{path} is for an embedding of {len(found.basis_DK)}, this one has {embedding_size}: {again}"
        )
    if len(found.states_EK) not in (0, 2 * embedding_size):
        raise PolybitError(f"{path} reads states of {len(found.states_EK)} numbers, not {2 * embedding_size}: {again}")
    missing = [width for width in found.widths if width not in widths]
    if missing:
        raise PolybitError(f"{path} asks for {missing[0]!r:.40}, which this checkpoint does not hold: {again}")
    return found


def parsed(value: Mapping[str, Any]) -> Router:
    """A router from JSON; ValueError when sizes do not fit or a number is no number."""
    widths = tuple(str(width) for width in value["widths"])
    arrays = {
        key: np.asarray(value[key], dtype=np.float64)
        for key in ("bits", "mean", "spread", "coefficients", "basis", "states")
    }
    if arrays["states"].size == 0:
        arrays["states"] = np.empty((0, 0))
    features = 0
    if arrays["basis"].ndim == 2 and arrays["states"].ndim == 2:
        features = len(FEATURES) + arrays["basis"].shape[1] + arrays["states"].shape[1]
    sizes = {
        "bits": (len(widths),),
        "mean": (features,),
        "spread": (features,),
        "coefficients": (len(widths), features + 1),
    }
    if not widths or len(widths) > MOST or not 0 < features < MOST:
        raise ValueError("no widths or no features")
    for key, size in sizes.items():
        if arrays[key].shape != size:
            raise ValueError(f"{key} has shape {arrays[key].shape} instead of {size}")
    price, budget = float(value["price"]), float(value["budget"])
    if not all(np.isfinite(array).all() for array in arrays.values()) or not math.isfinite(price + budget) or price < 0:
        raise ValueError("a number is not finite")
    margins = {str(pair): float(margin) for pair, margin in dict(value["margins"]).items()}
    if not all(math.isfinite(margin) and margin >= 0 for margin in margins.values()):
        raise ValueError("a margin is no number of nats")
    if (arrays["spread"] <= 0).any():
        raise ValueError("spread must be positive")
    return Router(
        widths,
        arrays["bits"],
        arrays["mean"],
        arrays["spread"],
        arrays["coefficients"],
        arrays["basis"],
        arrays["states"],
        price,
        budget,
        margins,
    )


def write_router(path: Path, router: Router, checkpoint: str) -> None:
    """Keep a router in a checkpoint's directory, whole or not at all."""
    with atomic_path(path) as staged:
        staged.write_text(json.dumps(router.to_json(checkpoint), allow_nan=False) + "\n", encoding="utf-8")
