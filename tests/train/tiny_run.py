"""A tiny trainable model with real pairs, for the tests of this folder."""

from __future__ import annotations

import copy
from functools import cache

import torch

from polybit.core.plan import Plan
from polybit.hub.lm import LocalLM
from polybit.nn.switch import at
from polybit.train.latent import Freedom, make_trainable
from polybit.train.material import PairMaterial, prepare
from polybit.train.pairs import Pair
from polybit.train.probe import forget
from tests.evals.tiny import tokenizer
from tests.families import tiny_model

TOKENS = 12


@cache
def float_lm(family: str = "llama") -> LocalLM:
    """A random float model of two layers with its tokenizer."""
    return LocalLM(tiny_model(family), tokenizer())


def trainable(widths=(3,), family: str = "llama", scales: str = "recomputed", **more) -> torch.nn.Module:
    """The same model behind fake quantization at each width."""
    presets = {f"w{b}": Plan.uniform(b) for b in widths}
    told = {"freedom": Freedom(scales=scales), **more}
    return make_trainable(copy.deepcopy(float_lm(family).model), presets, group_size=32, **told)


def prompts(count: int) -> list[list[int]]:
    """Random prompts of 4 to 9 tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (4 + n % 6,), generator=generator).tolist() for n in range(count)]


@cache
def pairs(count: int = 24, width: int = 3, family: str = "llama") -> tuple[Pair, ...]:
    """Greedy answers of the float model and of its rounding."""
    model = trainable((width,), family)
    lm = LocalLM(model, tokenizer(), keep_decoded=False)
    with at(model, f"w{width}"):
        ours = lm.generate_tokens(prompts(count), max_tokens=TOKENS)
    forget(model)
    theirs = float_lm(family).generate_tokens(prompts(count), max_tokens=TOKENS)
    return tuple(Pair.of(*row) for row in zip(prompts(count), theirs, ours, strict=True))


def material(count: int = 24, width: int = 3, family: str = "llama") -> PairMaterial:
    """The pairs with the float model's scores."""
    return prepare(float_lm(family), pairs(count, width, family))


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
