"""Change the precision of a whole model while it runs: use, at, random_precision, current, multiply_by.

Weights and activations are set layer by layer, attention operands (q, k, v) attention by attention (nn/attention.py).

The model stays a plain module tree, so `generate` and every caller work unchanged. Switching sets one attribute per
layer and copies no weight. One model has one precision at a time: a second thread inside `at` is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock, get_ident
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from polybit.core.plan import ColumnWidths, Plan
from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.kernels import ops
from polybit.nn.adapters import wear
from polybit.nn.attention import asks_for_operands, attention_layers, operand_precisions, operands_of, ports
from polybit.nn.board import Board, board_of, panel
from polybit.nn.draw import Rows, split_batches
from polybit.nn.fields import check_columns
from polybit.nn.fuse import fuse, unfuse
from polybit.nn.layer import SwitchableLayer
from polybit.nn.linear import QuantWeight

Wanted = str | int | Precision | Plan
Entry = tuple[SwitchableLayer, Precision, ColumnWidths | None]  # a layer, its precision, its column offsets
HELD: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()  # the thread inside `at` with a model
HOLDING = Lock()


def stored_layers(model: nn.Module) -> dict[str, QuantWeight]:
    """The layers of a model that read a stored weight, by name: all switchable ones but those in training."""
    return {name: layer for name, layer in panel(model).layers.items() if isinstance(layer, QuantWeight)}


def set_presets(model: nn.Module, presets: Mapping[str, Plan]) -> None:
    """Give the model named plans that `use` understands; every plan is checked against the model."""
    board = panel(model)
    for plan in presets.values():
        check(model, board, plan)
    board.presets = dict(presets)


def presets(model: nn.Module) -> dict[str, Plan]:
    """The named plans of the model."""
    return dict(panel(model).presets)


def use(model: nn.Module, wanted: Wanted) -> nn.Module:
    """Switch every quantized layer of `model` and return it: a preset's name, `w4`, `w4a8k8v4`, 4, "float", or a Plan.

    "float" (w = 16) reads all stored bits. Raises PolybitError, leaving the model as it was, for an unknown preset or
    layer, for more weight bits than are stored, and for attention operands that cannot be reached. Adapters of a preset
    (nn/adapters.py) are used with it and with nothing else.
    """
    board = panel(model)
    plan = read(board, wanted)
    layers = check(model, board, plan)
    for operands, precision in operand_precisions(model, plan):
        operands.precision = precision
    for layer, precision, offsets in layers:
        layer.set_precision(precision, offsets)
    wear(model, wanted if isinstance(wanted, str) and wanted in board.presets else None)
    return model


def check(model: nn.Module, board: Board, plan: Plan) -> list[Entry]:
    """Every quantized layer with what the plan gives it; refused when the model cannot have it."""
    inner = attention_layers(model) if asks_for_operands(plan) else {}
    found = precisions(board, plan, attention=inner)
    operand_precisions(model, plan)
    return found


@contextmanager
def at(model: nn.Module, wanted: Wanted) -> Iterator[nn.Module]:
    """`with at(model, "w3a4"): ...`: switch for the body, then back to what every layer had before.

    A model has one precision at a time: a second thread inside is refused (PolybitError), for it would change the
    answers of the first.
    """
    with as_it_was(model):
        use(model, wanted)
        yield model


def hold(model: nn.Module) -> int | None:
    """Note that this thread chose the model's precision; returns who had before it."""
    with HOLDING:
        before, me = HELD.get(model), get_ident()
        if before not in (None, me):
            raise PolybitError(
                "another thread is inside polybit.at with this model, which has one precision at a time: take turns by "
                "a lock, give each thread a model of its own, or let polybit serve answer at several"
            )
        HELD[model] = me
    return before


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Give every layer and every attention back the precision it has now when the body ends."""
    board, before = panel(model), hold(model)
    layers = [(layer, layer.precision, layer.offsets) for layer in board.layers.values()]
    operands, worn = operands_of(model), board.worn
    try:
        yield
    finally:
        HELD[model] = before
        wear(model, worn)
        for layer, precision, offsets in layers:
            layer.set_precision(precision, offsets)
        for name, port in (ports(model) if board.operands is not None else {}).items():
            port.precision = operands.get(name, Precision())


@contextmanager
def random_precision(
    model: nn.Module, choices: Sequence[Wanted], *, seed: int, per: Literal["pass", "prompt"] = "pass"
) -> Iterator[nn.Module]:
    """Draw one of `choices` at random during the body; the same seed draws the same sequence.

    per "pass": anew for every forward pass, one precision for the whole batch. per "prompt": each prompt of a batch has
    its own, for all tokens of its answer; beams and repeated samples of a prompt share it.
    Random precision inference (Double-Win Quant, Fu et al., ICML 2021) shows an attacker another network each time.
    Unlike the paper's code, which draws per batch, a draw per prompt is offered.
    """
    if per not in ("pass", "prompt"):
        raise PolybitError(f"random precision per {per!r} is not possible: choose 'pass' or 'prompt'")
    board = panel(model)
    plans = [read(board, choice) for choice in choices]
    if not plans:
        raise PolybitError("random precision needs at least one precision to choose from")
    table = [check(model, board, plan) for plan in plans]
    generator = torch.Generator().manual_seed(seed)
    with as_it_was(model):
        if per == "prompt":
            use(model, plans[0])
            same_operands(model, plans)
            entries = zip(*table, strict=True)  # one tuple per layer: (layer, precision) for each choice
            puts = {row[0][0]: partial(put_choice, row) for row in entries}
            board.rows = Rows(len(plans), generator)
            try:
                with split_batches(model, board.rows, puts):  # type: ignore[arg-type]
                    yield model
            finally:
                board.rows = None
            return

        def draw(*_: object) -> None:
            use(model, plans[int(torch.randint(len(plans), (), generator=generator))])

        hook = model.register_forward_pre_hook(draw)
        try:
            yield model
        finally:
            hook.remove()


def put_choice(entries: Sequence[Entry], choice: int) -> None:
    """Set one layer to the precision it has in a choice."""
    layer, precision, offsets = entries[choice]
    layer.set_precision(precision, offsets)


def same_operands(model: nn.Module, plans: Sequence[Plan]) -> None:
    """Refuse choices whose keys or values differ: one cache holds all prompts of a batch."""
    first, *others = [[precision for _, precision in operand_precisions(model, plan)] for plan in plans]
    if any(other != first for other in others):
        raise PolybitError(
            "precisions drawn per prompt differ in q, k or v, which all prompts of a batch share: "
            "give the same q, k and v in every choice, or draw per pass"
        )


def keep_rows(model: nn.Module, rows: Sequence[int]) -> None:
    """Say which rows of the running batch go on being answered; needed only inside `random_precision(per="prompt")`."""
    running = board_of(model).rows
    if running is not None:
        running.keep(rows)


def current(model: nn.Module) -> Plan:
    """The precision every layer has now; the commonest one is the plan's default."""
    layers = panel(model).layers
    default = Counter(layer.precision for layer in layers.values()).most_common(1)[0][0]
    others = {name: layer.precision for name, layer in layers.items() if layer.precision != default}
    return Plan(default, others, {name: layer.offsets for name, layer in layers.items() if layer.offsets is not None})


@contextmanager
def keep_decoded(model: nn.Module) -> Iterator[nn.Module]:
    """Keep each decoded weight of the current width in memory during the body, until the model is switched.

    Costs 4 bytes per quantized weight (as much as a float32 model); pays for many small batches on a CPU.
    """
    layers = list(stored_layers(model).values())
    for layer in layers:
        layer.keep = True
    try:
        yield model
    finally:
        for layer in layers:
            layer.keep, layer.kept = False, None


def multiply_by(model: nn.Module, arithmetic: ops.Arithmetic | None = None) -> nn.Module:
    """Choose how every layer multiplies: "float" (exact, the default of a model), "int16", "int8", or None for the
    fastest whose error stays below 1e-4 where the model is now. In the fast modes layers that share an input multiply
    in one call (nn/fuse.py).
    """
    layers = stored_layers(model)
    chosen = arithmetic or ops.best_arithmetic(next(iter(layers.values())).qplanes.device)
    for layer in layers.values():
        layer.arithmetic = chosen
    return unfuse(model) if chosen == "float" else fuse(model)


def read(board: Board, wanted: Wanted) -> Plan:
    """A Plan from anything `use` takes."""
    if isinstance(wanted, Plan):
        return wanted
    if isinstance(wanted, str) and wanted in board.presets:
        return board.presets[wanted]
    try:
        plan = Plan.uniform(wanted)
    except PolybitError as error:
        if not board.presets or not isinstance(wanted, str):
            raise
        names = ", ".join(sorted(board.presets))
        raise PolybitError(f"{error}; this model also has the presets {names}") from None
    base = board.presets.get(f"w{plan.default.w}")
    return plan if base is None else reread(base, plan.default)


def reread(base: Plan, asked: Precision) -> Plan:
    """The widths of a preset with the activation and attention bits that were asked for: `w4a8` where `w4` is a preset.

    A preset of a plain width says that some layers keep theirs, as the output head does.
    """
    layers = {name: replace(asked, w=precision.w) for name, precision in base.layers.items()}
    return Plan(replace(asked, w=base.default.w), layers, base.columns)


def precisions(board: Board, plan: Plan, *, attention: Iterable[str] = ()) -> list[Entry]:
    """Every layer with its precision in the plan, checked; a plan may name attention layers too."""
    plan.check_names([*board.layers, *attention])
    least = min(layer.bits for layer in board.layers.values())
    check_columns(plan, board.layers)
    found = [(layer, plan.at(name), plan.columns.get(name)) for name, layer in board.layers.items()]
    if max((p.w for p in (plan.default, *plan.layers.values()) if p.w != FLOAT), default=0) > least:
        for name, layer in board.layers.items():
            width = plan.at(name).w
            if layer.bits < width != FLOAT:
                raise PolybitError(
                    f"layer {name!r} is stored at {layer.bits} bits, {width} were asked for: "
                    f"choose at most {layer.bits}, or 'float' for all stored bits"
                )
    return found
