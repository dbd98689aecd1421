"""Change the precision of a whole model while it runs: use, at, random_precision, current, multiply_by.

The model stays a plain module tree, so `generate` and every caller work unchanged. Switching sets one attribute per
layer and copies no weight. One model has one precision at a time: two threads must not switch the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from polybit.core.plan import Plan
from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.kernels import ops
from polybit.nn.linear import QuantWeight

Wanted = str | int | Precision | Plan


@dataclass(slots=True)
class Panel:
    """What switching needs to know of a model: its quantized layers by name, and its named plans."""

    layers: dict[str, QuantWeight]
    presets: dict[str, Plan] = field(default_factory=dict)


def panel(model: nn.Module) -> Panel:
    """The panel of a model, made at the first call and kept on the model."""
    found = model.__dict__.get("polybit_panel")
    if found is None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}
        if not layers:
            raise PolybitError("the model has no quantized layer: quantize it first, or load a polybit checkpoint")
        found = model.__dict__["polybit_panel"] = Panel(layers)
    return found


def set_presets(model: nn.Module, presets: Mapping[str, Plan]) -> None:
    """Give the model named plans that `use` understands; every plan is checked against the model."""
    board = panel(model)
    for plan in presets.values():
        precisions(board, plan)
    board.presets = dict(presets)


def presets(model: nn.Module) -> dict[str, Plan]:
    """The named plans of the model."""
    return dict(panel(model).presets)


def use(model: nn.Module, wanted: Wanted) -> nn.Module:
    """Switch every quantized layer of `model` and return it: a preset's name, `w4`, `w4a8`, 4, "float", or a Plan.

    "float" (w = 16) reads all stored bits. Raises PolybitError, leaving the model as it was, for an unknown preset or
    layer and for more weight bits than are stored.
    """
    board = panel(model)
    for layer, precision in precisions(board, read(board, wanted)):
        put(layer, precision)
    return model


def put(layer: QuantWeight, precision: Precision) -> None:
    """Set the precision of one layer and let its kept weight go; past nn.Module's slow attribute hook."""
    state = layer.__dict__
    state["precision"] = precision
    state["kept"] = None


@contextmanager
def at(model: nn.Module, wanted: Wanted) -> Iterator[nn.Module]:
    """`with at(model, "w3a4"): ...`: switch for the body, then back to what every layer had before."""
    before = [(layer, layer.precision) for layer in panel(model).layers.values()]
    use(model, wanted)
    try:
        yield model
    finally:
        for layer, precision in before:
            put(layer, precision)


@contextmanager
def random_precision(model: nn.Module, choices: Sequence[Wanted], *, seed: int) -> Iterator[nn.Module]:
    """Draw one of `choices` anew for every forward pass of the body; the same seed draws the same sequence.

    Random precision inference (Double-Win Quant, Fu et al., ICML 2021) shows an attacker another network each time.
    """
    board = panel(model)
    plans = [read(board, choice) for choice in choices]
    if not plans:
        raise PolybitError("random precision needs at least one precision to choose from")
    for plan in plans:
        precisions(board, plan)
    generator = torch.Generator().manual_seed(seed)

    def draw(*_: object) -> None:
        use(model, plans[int(torch.randint(len(plans), (), generator=generator))])

    before = [(layer, layer.precision) for layer in board.layers.values()]
    hook = model.register_forward_pre_hook(draw)
    try:
        yield model
    finally:
        hook.remove()
        for layer, precision in before:
            put(layer, precision)


def current(model: nn.Module) -> Plan:
    """The precision every layer has now; the commonest one is the plan's default."""
    layers = panel(model).layers
    default = Counter(layer.precision for layer in layers.values()).most_common(1)[0][0]
    return Plan(default, {name: layer.precision for name, layer in layers.items() if layer.precision != default})


@contextmanager
def keep_decoded(model: nn.Module) -> Iterator[nn.Module]:
    """Keep each decoded weight of the current width in memory during the body, until the model is switched.

    Costs 4 bytes per quantized weight (as much as a float32 model); pays for many small batches on a CPU.
    """
    layers = list(panel(model).layers.values())
    for layer in layers:
        layer.keep = True
    try:
        yield model
    finally:
        for layer in layers:
            layer.keep, layer.kept = False, None


def multiply_by(model: nn.Module, activations: ops.Activations | None = None) -> nn.Module:
    """Choose how every layer multiplies: "float" (exact, the default of a model), "int16", "int8", or None for the
    fastest whose error stays below 1e-4 on this machine.
    """
    for layer in panel(model).layers.values():
        layer.activations = activations or ops.best_mode()
    return model


def read(board: Panel, wanted: Wanted) -> Plan:
    """A Plan from anything `use` takes."""
    if isinstance(wanted, Plan):
        return wanted
    if isinstance(wanted, str) and wanted in board.presets:
        return board.presets[wanted]
    try:
        return Plan.uniform(wanted)
    except PolybitError as error:
        if not board.presets or not isinstance(wanted, str):
            raise
        names = ", ".join(sorted(board.presets))
        raise PolybitError(f"{error}; this model also has the presets {names}") from None


def precisions(board: Panel, plan: Plan) -> list[tuple[QuantWeight, Precision]]:
    """Every layer with its precision in the plan, checked."""
    plan.check_names(board.layers)
    least = min(layer.fields.bits for layer in board.layers.values())
    for precision in {plan.default, *plan.layers.values()}:
        if min(precision.q, precision.k, precision.v) != FLOAT:
            raise PolybitError(
                f"precision '{precision}' asks for quantized attention operands, which this model computes in float: "
                "leave q, k and v out"
            )
    found = [(layer, plan.at(name)) for name, layer in board.layers.items()]
    if max((p.w for p in (plan.default, *plan.layers.values()) if p.w != FLOAT), default=0) > least:
        for name, layer in board.layers.items():
            width = plan.at(name).w
            if layer.fields.bits < width != FLOAT:
                raise PolybitError(
                    f"layer {name!r} is stored at {layer.fields.bits} bits, {width} were asked for: "
                    f"choose at most {layer.fields.bits}, or 'float' for all stored bits"
                )
    return found
