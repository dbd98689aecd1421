"""The work of one token, counted and not timed: multiply-adds by their operands' widths, bytes of float weights."""

from __future__ import annotations

from typing import Any

from polybit.core.cost import Work, bitops_of
from polybit.core.precision import Precision
from polybit.nn.attention import attention_layers, operands_of
from polybit.nn.linear import QuantWeight, TiedHead
from polybit.nn.switch import stored_layers


def model_bitops(model: Any, context: int) -> float:
    """BitOPs of a token at the precision the model has now; it sees `context` tokens."""
    work = [
        (Work(name, linear_macs(model, layer, name)), Precision(w=layer.width, a=layer.precision.a))
        for name, layer in stored_layers(model).items()
    ]
    operands = operands_of(model)
    for name, scores, values in attention_work(model, context):
        precision = operands.get(name, Precision())
        work += [(scores, precision), (values, precision)]
    return bitops_of([*work, (Work("head", float_head(model)), Precision())])


def everything(model: Any, context: int) -> list[Work]:
    """All the work of a token."""
    found = [Work(name, linear_macs(model, layer, name)) for name, layer in stored_layers(model).items()]
    found += [work for _, scores, values in attention_work(model, context) for work in (scores, values)]
    return [*found, Work("head", float_head(model))]


def attention_work(model: Any, context: int) -> list[tuple[str, Work, Work]]:
    """(attention layer, its scores, its mixing of values) of a token that sees `context` tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    macs = float(heads * size * context)
    return [(name, Work("scores", macs, "qk"), Work("values", macs, "pv")) for name in attention_layers(model)]


def linear_macs(model: Any, layer: QuantWeight, name: str) -> float:
    """Multiply-adds of a quantized layer for one token; of fused experts only those that are chosen work."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", 1) / experts if experts and ".experts." in f".{name}." else 1.0
    lookup = layer.kind == "embedding" and model.get_output_embeddings() is None
    return 0.0 if lookup else layer.rows * layer.columns * chosen


def float_head(model: Any) -> float:
    """Multiply-adds of an output head left in float."""
    head = model.get_output_embeddings()
    return 0.0 if head is None or isinstance(head, (QuantWeight, TiedHead)) else float(head.weight.numel())


def float_bytes(model: Any) -> float:
    """Bytes of float weights a token reads: all of them, but one row of an input embedding that is no output head."""
    stored = {id(p) for layer in stored_layers(model).values() for p in layer.parameters(recurse=False)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    total = 0
    for parameter in model.parameters():
        if id(parameter) in stored:
            continue
        rows = 1 if parameter is embedding and parameter is not head else parameter.shape[0] if parameter.ndim else 1
        total += parameter[:rows].numel() * parameter.element_size() if parameter.ndim else parameter.element_size()
    return float(total)
