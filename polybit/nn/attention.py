"""Quantized attention: queries, keys and values of every attention layer at their own widths, chosen while running.

One `Operands` per attention layer stands between the layer and its cache: keys and values pass through it after rotary
positions, on every architecture that hands them to a cache (the decoders of transformers 5 do); queries are rounded as
they leave their projection or its norm. Without a cache they are rounded as the stores of nn/keyvalue.py would; a cache
that packs (hub/cache.py) rounds by itself and is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.affine import fake_quantize_tokens
from polybit.core.plan import Plan
from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.nn.board import board_of
from polybit.nn.keyvalue import BLOCK, GROUP
from polybit.nn.operands import CACHE_NAMES, Operands, Passage

QUERY_NAMES = ("q_norm", "q_layernorm", "q_proj", "c_attn", "query_key_value")  # the first one an attention has


def ports(model: nn.Module) -> dict[str, Operands]:
    """The operands of every attention layer by the layer's name, put in place at the first call; empty where none."""
    board = board_of(model)
    found = board.operands
    if found is None:
        found = board.operands = {}
        for name, module in attention_layers(model).items():
            place = getattr(module, "layer_idx", getattr(module, "layer_id", None))
            operands = found[name] = Operands(name, len(found) if place is None else int(place), module)
            module.register_forward_pre_hook(partial(before_attention, operands), with_kwargs=True)
    for operands in found.values():
        watch_queries(operands)
    return found


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that compute keys and values themselves: they take a cache and own a projection."""
    found = {}
    for name, module in model.named_modules():
        if not name or "attention" not in type(module).__name__.lower():
            continue
        owns = any(list(child.parameters(recurse=False)) for child in module.children())
        if owns and cache_argument(module) is not None:
            found[name] = module
    return found


def cache_argument(module: nn.Module) -> str | None:
    """What the module calls the cache it is given."""
    known = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def before_attention(operands: Operands, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Put a Passage where the cache is given; nothing changes for float operands or a cache that packs."""
    if operands.precision.k == FLOAT and operands.precision.v == FLOAT:
        return None
    name = cache_argument(module)
    assert name is not None
    bound = inspect.signature(module.forward).bind_partial(*args)
    place = list(bound.arguments).index(name) if name in bound.arguments else None
    cache = kwargs.get(name) if place is None else args[place]
    if getattr(cache, "packs", False):
        return None
    passage = Passage(operands, cache)
    if place is None:
        return args, {**kwargs, name: passage}
    return (*args[:place], passage, *args[place + 1 :]), kwargs


def watch_queries(operands: Operands) -> None:
    """Round queries where they leave their projection or norm; again after that module was replaced."""
    module = operands.module
    name = next((n for n in QUERY_NAMES if isinstance(getattr(module, n, None), nn.Module)), None)
    size = getattr(module, "head_dim", getattr(module, "head_size", None))
    if name is None or size is None:
        operands.query = None
        return
    if getattr(module, name) is operands.query:
        return
    operands.query = getattr(module, name)
    operands.query.register_forward_hook(partial(after_queries, operands, name, int(size)))


def after_queries(operands: Operands, name: str, size: int, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    """The output of a query projection with its queries at the width of now."""
    bits = operands.precision.q
    groups = getattr(operands.module, "num_kv_heads", None)
    return output if bits == FLOAT else round_queries(output, name, size, bits, groups)


def round_queries(output: Tensor, name: str, size: int, bits: int, groups: int | None = None) -> Tensor:
    """Round the queries in a projection's output, symmetric with one scale per token and head of `size` channels.

    In GPT-2's c_attn they are the first third of the channels, in query_key_value all but the last two heads, a key
    and a value, of each of the `groups` that Falcon makes, or of each three heads.
    """
    if name == "c_attn":
        third = output.shape[-1] // 3
        return torch.cat([round_queries(output[..., :third], "", size, bits), output[..., third:]], dim=-1)
    if name == "query_key_value":
        heads = output.unflatten(-1, (-1, 3, size) if groups is None else (groups, -1, size))
        rounded = fake_quantize_tokens(heads[..., :-2, :], bits)
        return torch.cat([rounded, heads[..., -2:, :]], dim=-2).flatten(-3)
    return fake_quantize_tokens(output.unflatten(-1, (-1, size)), bits).flatten(-2)


def asks_for_operands(plan: Plan) -> bool:
    """True when a plan gives a width to q, k or v anywhere."""
    return any(min(p.q, p.k, p.v) != FLOAT for p in (plan.default, *plan.layers.values()))


def operand_precisions(model: nn.Module, plan: Plan) -> list[tuple[Operands, Precision]]:
    """Every attention layer with its widths in the plan, checked.

    A width for q, k or v is what the plan says for one of the attention's own layers (the narrowest, where several
    speak), else for the attention layer by name, else the plan's default.
    Raises PolybitError for a model whose attention cannot be reached, and for operands of a layer outside attention.
    """
    if not asks_for_operands(plan) and board_of(model).operands is None:
        return []
    known = ports(model)
    if not asks_for_operands(plan):
        return [(operands, Precision()) for operands in known.values()]
    if not known:
        raise PolybitError(
            "the precision asks for quantized attention operands, but no attention layer of this model takes a cache: "
            "leave q, k and v out"
        )
    for layer, precision in plan.layers.items():
        inside = any(layer == name or layer.startswith(name + ".") for name in known)
        if not inside and min(precision.q, precision.k, precision.v) != FLOAT:
            raise PolybitError(
                f"layer {layer!r} is given {precision}, but it belongs to no attention: leave q, k and v out there, or "
                f"name an attention layer such as {next(iter(known))!r}"
            )
    found = [(operands, chosen(plan, name)) for name, operands in known.items()]
    for operands, precision in found:
        if precision.q != FLOAT and operands.query is None:
            raise PolybitError(
                f"the queries of {operands.name!r} ({type(operands.module).__name__}) cannot be told from its keys: "
                "leave q out for this architecture"
            )
    return found


def chosen(plan: Plan, name: str) -> Precision:
    """The q, k and v of one attention layer in a plan."""
    widths = {}
    own = [p for layer, p in plan.layers.items() if layer.startswith(name + ".")]
    for operand in ("q", "k", "v"):
        said = [getattr(p, operand) for p in own if getattr(p, operand) != FLOAT]
        widths[operand] = min(said) if said else getattr(plan.layers.get(name, plan.default), operand)
    return Precision(**widths)


def use_operands(model: nn.Module, plan: Plan) -> nn.Module:
    """Set q, k and v of every attention layer from a plan, on any model, quantized or not; returns the model."""
    for operands, precision in operand_precisions(model, plan):
        operands.precision = precision
    return model


def operands_of(model: nn.Module) -> Mapping[str, Precision]:
    """The widths of q, k and v now, by attention layer; empty where none was ever asked for."""
    found = board_of(model).operands or {}
    return {name: operands.precision for name, operands in found.items()}


def arrange(model: nn.Module, *, keys: str = "channel", group: int = GROUP, block: int = BLOCK) -> nn.Module:
    """Choose how caches made from now on keep keys: one scale per channel and `block` tokens (KIVI), or per token and
    `group` channels; values are always per token. Returns the model.
    """
    if keys not in ("token", "channel"):
        raise PolybitError(f"keys {keys!r} are not possible: choose 'token' or 'channel'")
    for label, value in (("group", group), ("block", block)):
        if value not in (16, 32, 64, 128, 256):
            raise PolybitError(f"{label} {value!r} is not possible: choose 16, 32, 64, 128 or 256")
    for operands in ports(model).values():
        operands.keys, operands.group, operands.block = keys, group, block
    return model
