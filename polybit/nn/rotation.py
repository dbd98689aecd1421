"""Turn the residual stream and the values of a model by orthogonal matrices folded into its weights: it says the same.

A few channels of the residual stream are many times larger than the others, and one scale per token then leaves the
others few steps. A randomized Hadamard matrix spreads every channel over all of them. RMS norms see only the length of
a vector, which turning keeps, so once their gains are folded into the layers behind them the whole stream can be turned
(QuaRot, arXiv 2404.00456, without its rotations at run time; R1 and R2 of SpinQuant, arXiv 2405.16406, not learned).
The model stays a plain one of the same architecture.
"""

from __future__ import annotations

from math import pi
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.records import Rotation
from polybit.core.runtime import PolybitError
from polybit.nn.board import board_of
from polybit.nn.convert import ends, is_tied

FAMILIES = {
    "LlamaForCausalLM": "Llama",
    "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
}
# norm of a block -> the layers that read what it gives
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # what a block adds to the stream
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # norms of single heads, in a basis that stays
CHUNK = 1 << 22  # numbers turned at once, in float64


def rotation_of(model: nn.Module) -> Rotation | None:
    """How a model in memory was turned, by `rotate` or as its checkpoint says; None if it was not."""
    return board_of(model).rotation


@torch.no_grad()
def rotate(model: nn.Module, rotation: Rotation) -> bool:
    """Turn a float model in place; True when its output head had to be untied from the embedding.

    The gains of its norms become ones, folded into the layers that read them; biases follow their layers. A tied head
    is turned with its embedding and stays tied where the last norm multiplies all channels by one number. Otherwise
    the head holds the gains of that norm and the embedding must not, so it becomes a weight of its own. Raises
    PolybitError, before anything is changed, for a model whose layers are not all known.
    """
    check(model)
    body: Any = model.model
    stream = rotation.signs("stream", body.embed_tokens.embedding_dim)
    untied = turn_ends(model, stream)
    for index, block in enumerate(body.layers):
        for name, readers in READERS.items():
            norm = block.get_submodule(name)
            for reader in readers:
                turn(block.get_submodule(reader).weight, stream, norm.weight)
            norm.weight.fill_(1)
        for name in WRITERS:
            layer = block.get_submodule(name)
            turn(layer.weight.detach().T, stream)
            if layer.bias is not None:
                turn(layer.bias.detach()[None], stream)
        turn_values(block.self_attn, rotation, index)
    board_of(model).rotation = rotation
    return untied


def turn_ends(model: nn.Module, stream: Tensor) -> bool:
    """The embedding, the last norm and the head; True when the head was untied."""
    embedding, head = ends(model)
    norm: Any = model.model.norm
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    if is_tied(model) and bool((norm.weight == norm.weight[0]).all()):
        turn(embedding.weight, stream)
        return False
    untied = is_tied(model)
    if untied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        model.all_tied_weights_keys = {}  # type: ignore[assignment]
    turn(head.weight, stream, norm.weight)
    norm.weight.fill_(1)
    turn(embedding.weight, stream)
    return untied


def turn_values(attention: Any, rotation: Rotation, index: int) -> None:
    """The values of one attention layer, every head alike, and the columns of the layer that reads them."""
    size, value, out = attention.head_dim, attention.v_proj, attention.o_proj
    signs = rotation.signs(f"values {index}", size)
    turn(value.weight.detach().view(-1, size, value.in_features).transpose(1, 2), signs)
    if value.bias is not None:
        turn(value.bias.detach().view(-1, size), signs)
    turn(out.weight.detach().view(out.out_features, -1, size), signs)


def turn(rows: Tensor, signs: Tensor, gain: Tensor | None = None) -> None:
    """Multiply the last axis of a tensor, in place, by its gains, the signs and the Hadamard matrix."""
    rows = rows.detach()
    factor = signs.to(rows.device) if gain is None else signs.to(rows.device) * gain.detach().double()
    for part in rows.split(max(1, CHUNK // max(rows[0].numel(), 1))):
        part.copy_(hadamard(part.double() * factor))


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] -> x (H ⊗ C): H the orthogonal Hadamard matrix of the largest power of two in n, C the orthogonal
    Hartley matrix of what is left, cos + sin of 2π i j / m over √m: no entry above √2 times the mean size.
    """
    size = x.shape[-1]
    even = size & -size
    odd = size // even
    y = x.reshape(-1, even, odd)
    step = 1
    while step < even:
        left, right = y.view(-1, even // (2 * step), 2, step, odd).unbind(2)
        y = torch.stack([left + right, left - right], 2)
        step *= 2
    y = y.reshape(-1, even, odd) / even**0.5
    if odd > 1:
        place = torch.arange(odd, device=x.device)
        angle = (place[:, None] * place % odd).to(x.dtype) * (2 * pi / odd)
        y = y @ ((angle.cos() + angle.sin()) / odd**0.5)
    return y.reshape(x.shape)


def check(model: nn.Module) -> None:
    """Refuse a model of which any weight is unknown, and one that was turned before."""
    kind = type(model).__name__
    if kind not in FAMILIES:
        raise PolybitError(
            f"a {kind:.60} cannot be rotated: only {', '.join(FAMILIES.values())} are known to have norms and layers "
            "that a rotation can be folded into; leave --rotate out"
        )
    if rotation_of(model) is not None:
        raise PolybitError("the model is rotated already: rotate the float model it was made from")
    body: Any = model.model
    linear = [*WRITERS, *(reader for readers in READERS.values() for reader in readers)]
    known = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for index in range(len(body.layers)):
        place = f"model.layers.{index}."
        known |= {f"{place}{name}.weight" for name in (*READERS, *HEAD_NORMS)}
        known |= {f"{place}{name}.{leaf}" for name in linear for leaf in ("weight", "bias")}
    modules = {"model.embed_tokens": nn.Embedding, "lm_head": nn.Linear}
    modules |= {f"model.layers.{index}.{name}": nn.Linear for index in range(len(body.layers)) for name in linear}
    strange = [name for name, _ in model.named_parameters() if name not in known]
    strange += [name for name, wanted in modules.items() if type(model.get_submodule(name)) is not wanted]
    if strange:
        raise PolybitError(
            f"{strange[0]!r:.120} is no part of a plain {FAMILIES[kind]}, so the model cannot be rotated: "
            "leave --rotate out, or give the float model without adapters and changed layers"
        )
