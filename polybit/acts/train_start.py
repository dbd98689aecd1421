"""Where training starts: a float model or a polybit checkpoint, made trainable at every preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from polybit.compress.sizes import base_model, quantized_layers, stored_widths
from polybit.core.affine import QWeight
from polybit.core.plan import Plan
from polybit.core.planes import unpack
from polybit.core.runtime import PolybitError
from polybit.hub.load import load_config, load_float, quantization_of
from polybit.hub.models import open_model, own_name, resolve
from polybit.hub.span import load_span
from polybit.hub.workspace import model_digest
from polybit.nn.linear import QuantLinear
from polybit.nn.rotation import rotate, rotation_of
from polybit.options.train import TrainOptions
from polybit.train.latent import Freedom, make_trainable, quantized_names
from polybit.train.schedules import widest_first
from polybit.train.spans import float_head


@dataclass(frozen=True, slots=True)
class Pupil:
    """A model made trainable.

    plans: its presets, from the most to the least precise · parent: the float model, as the user named it · digest: of
    the weights it starts from.
    """

    model: nn.Module
    tokenizer: Any
    plans: Mapping[str, Plan]
    parent: str
    digest: str


def pupil_of_words(name: str, options: TrainOptions, presets: Mapping[str, Plan]) -> Pupil:
    """A language model: a float model, or a checkpoint, whose codes it starts from."""
    loaded, tokenizer = open_model(name, trust_remote_code=options.trust_remote_code)
    digest, start, model, parent = model_digest(loaded), None, loaded, own_name(name)
    if stored_widths(loaded) is not None:
        start = codes_of(name, loaded)
        parent = options.reference or base_model(loaded) or ""
        if not parent:
            raise PolybitError(f"{name} does not say which model it was made from: name it with --reference")
        model, tokenizer = load_float(resolve(parent), trust_remote_code=options.trust_remote_code)
        if (rotation := rotation_of(loaded)) is not None:
            rotate(model, rotation)  # it says the same, in the basis of the codes
    elif options.reference is not None:
        raise PolybitError(f"--reference {options.reference}: {name} is itself a float model, leave it out")
    freedom = Freedom(
        scales=options.scales,
        rank=options.rank,
        seed=options.seed,
        others="norms" if options.norms else False,
        # codes of a checkpoint make up for each other's errors, which latents at the borders of their cells would undo
        margin=0.0 if start is None else 0.5,
    )
    make_trainable(model, presets, start=start, group_size=options.group_size, adapter=options.adapter, freedom=freedom)
    return Pupil(model, tokenizer, in_order(model, presets), parent, digest)


def codes_of(name: str, checkpoint: nn.Module) -> dict[str, QWeight]:
    """The codes of every layer of a checkpoint."""
    layers = quantized_layers(checkpoint)
    others = [key for key, layer in layers.items() if not isinstance(layer, QuantLinear)]
    if others:
        raise PolybitError(
            f"{others[0]!r:.120} of {name} is no linear layer and cannot be trained: quantize it otherwise"
        )
    return {key: unpack(layer.planes) for key, layer in layers.items()}


def pupil_of_spans(name: str, options: TrainOptions, presets: Mapping[str, Plan]) -> Pupil:
    """A float model with a span head, a new one where it has none; the head stays in float."""
    source = resolve(name)
    if quantization_of(source) is not None:
        raise PolybitError(f"{name} is quantized: a span head is trained from the float model, give that")
    architectures = getattr(load_config(source), "architectures", None) or []
    headed = any("QuestionAnswering" in architecture for architecture in architectures)
    model, tokenizer = load_span(source, new_head=not headed)
    plans = float_head(presets)
    freedom = Freedom(scales=options.scales, rank=options.rank, seed=options.seed)
    make_trainable(model, plans, group_size=options.group_size, adapter=options.adapter, freedom=freedom)
    return Pupil(model, tokenizer, in_order(model, plans), own_name(name), model_digest(model))


def in_order(model: nn.Module, presets: Mapping[str, Plan]) -> dict[str, Plan]:
    """The presets from the most to the least precise."""
    return {name: presets[name] for name in widest_first(presets, quantized_names(model))}
