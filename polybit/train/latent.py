"""Trainable quantized layers: latent float weights behind fake quantization, switched by preset, frozen when done.

What the file holds after `freeze`, for presets of the widths b_1 > b_2 > ..., in bits per weight with groups of G:
- shared codes, no adapter: one elastic code of b_1 bits whose leading bits are every narrower width, b_1 + 24/G and a
  few ratios. One checkpoint serves all presets.
- shared codes, LoRA: the same, and beside it an adapter per preset, 16 r (O + I) bits a layer, in peft's files.
- own codes: each width has its scales and codes, Q_b(W + B_b A_b) with a nested adapter of which nothing is left. Each
  width is a pure checkpoint of b + 24/G bits a weight, all of them together hold the sum; `freeze` makes one of them.

A nested adapter needs own codes: one stored code cannot stand for different weights at different widths.

A layer of 32 inputs and one output from start to end. Presets read one code, with 16 and 4 levels:

    >>> model = nn.Sequential(nn.Linear(32, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.linspace(-1, 1, 32))
    >>> _ = make_trainable(model, {"A": Plan.uniform(4), "B": Plan.uniform(2)}, group_size=32)
    >>> [len(use(model, preset)[0].weight().unique()) for preset in ("A", "B")]
    [16, 4]

Training moves the latent weights; the next pass multiplies with the codes that they now stand for:

    >>> x, optimizer = torch.ones(1, 32), torch.optim.SGD(model.parameters(), lr=0.01)
    >>> before = [float(use(model, preset)(x).detach()) for preset in ("A", "B")]
    >>> use(model, "A")(x).sum().backward()
    >>> optimizer.step()
    >>> y = [use(model, preset)(x).detach() for preset in ("A", "B")]
    >>> [float(now) < then for now, then in zip(y, before)]
    [True, True]

And `freeze` keeps these codes alone, with the answers of the last pass:

    >>> frozen = freeze(model)
    >>> close = [torch.allclose(use(frozen, preset)(x), now, atol=1e-3) for preset, now in zip("AB", y)]
    >>> type(frozen[0]).__name__, close
    ('QuantLinear', [True, True])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from polybit.core.affine import Grid, QWeight, ZeroKind, fake_quantize_tokens, split_groups
from polybit.core.plan import ColumnWidths, Plan
from polybit.core.planes import pack, unpack
from polybit.core.precision import FLOAT, Precision
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError, track
from polybit.nn.adapters import Lora, plug
from polybit.nn.board import board_of
from polybit.nn.convert import Target, install, place, refuse_save, targets
from polybit.nn.fields import Fields, tensors_of
from polybit.nn.linear import QuantLinear
from polybit.nn.switch import set_presets, use
from polybit.quant.rounding import start_latents
from polybit.quant.rtn import rtn
from polybit.train.adapters import NestedAdapter
from polybit.train.chain import Chain
from polybit.train.start import quick_start
from polybit.train.straight import Code, Scales

AdapterKind = Literal["none", "nested", "lora"]
Codes = Literal["shared", "own"]
FLOAT_PRESET = "float"
ON_BORDER = 0.01  # codes: 16-bit scales leave weights that were quantized before a little beside the border they are on


@dataclass(frozen=True, slots=True)
class Freedom:
    """What may move while training.

    codes: one elastic code for all widths, or own ones per width (None: own with nested adapters, else shared) ·
    scales: learned, frozen, or recomputed from the latent weights · base: train the latent weights themselves, not only
    adapters · others: train embeddings, norms and biases too, or only norms and biases ("norms"); the float preset is
    then no longer the model it was made from, so a teacher is a model of its own · rank: of the adapter at its
    narrowest width · margin: distance a latent weight keeps at the start from the borders of its cell, in codes (up to
    0.5 = the middle). Compensated codes lie across a border from their weight, and weights that were quantized
    before (GGUF) right on one (of recomputed scales only those move); without a margin the first steps carry them
    over at random · chained: widths that get a latent weight of their own, in one shared code (chain.py); scales and
    whatever wider widths read then stay those of the start as far as they can · seed: of what adapters begin with.
    """

    codes: Codes | None = None
    scales: Scales = "learned"
    base: bool = True
    others: bool | Literal["norms"] = False
    rank: int = 16
    margin: float = 0.0
    chained: tuple[int, ...] = ()
    seed: int = 0


class LatentLinear(nn.Module):
    """A linear layer with latent float weights; forward multiplies with what would be stored at the current precision.

    A precision of float reads the weight the model came with, which is not trained: the float model as a teacher.
    """

    source_OI: Tensor
    bias: nn.Parameter | None

    def __init__(self, target: Target, source_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.target = target
        self.in_features, self.out_features = target.columns, target.rows
        self.latent_OI = nn.Parameter(source_OI.clone())
        self.register_buffer("source_OI", source_OI, persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        self.codes = nn.ModuleDict()
        self.nested: NestedAdapter | None = None
        self.loras = nn.ModuleDict()
        self.precision: Precision = Precision()
        self.offsets: ColumnWidths | None = None
        self.preset: str | None = None
        self.group_size = 0  # trained with one width per layer: no plan gives it others inside

    @property
    def bits(self) -> int:
        """The widest width that will be stored."""
        return max(int(key) for key in self.codes)

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.in_features

    def set_precision(self, precision: Precision, offsets: ColumnWidths | None = None) -> None:
        """Read the weight so from now on; kept weights follow the versions of what they were made from."""
        self.precision, self.offsets = precision, offsets

    def wear(self, preset: str | None) -> None:
        """Use the LoRA adapter of a preset, where the layer has it."""
        self.preset = preset

    def code(self, width: int) -> Code:
        """The grid a width is read from."""
        key = str(width) if str(width) in self.codes else max(self.codes, key=int)
        return self.codes[key]  # type: ignore[return-value]

    def full(self, width: int) -> Tensor:
        """The float weight that is quantized at a width: the latent weight and its nested adapter."""
        return self.latent_OI if self.nested is None else self.latent_OI + self.nested(width)

    def weight(self) -> Tensor:
        """The weight at the current precision, float32 [O, I]."""
        width = self.precision.w
        if width == FLOAT:
            return self.source_OI
        key = (self.latent_OI._version, None if self.nested is None else self.nested.versions())
        return self.code(width)(self.full(width), width, key)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in x's dtype; the arithmetic of QuantLinear with kept weights."""
        bits = self.precision.a
        rounded = x if bits == FLOAT else fake_quantize_tokens(x.float(), bits).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        y = linear(rounded.float(), self.weight(), bias).to(x.dtype)
        return y if self.preset is None or self.preset not in self.loras else y + self.loras[self.preset](x)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.in_features}, {self.out_features}, codes of {', '.join(self.codes)} bits, now={self.precision}"


def make_trainable(
    model: nn.Module,
    presets: Mapping[str, Plan],
    *,
    start: Mapping[str, QWeight] | None = None,
    group_size: int = 64,
    zero: ZeroKind = "group",
    adapter: AdapterKind = "none",
    freedom: Freedom | None = None,
) -> nn.Module:
    """Replace the layers that `presets` quantize by trainable ones, in place, and return the model.

    A float model starts from a quick quantization of its weights, or from `start` (layer -> codes of the widest width,
    as `polybit quantize` makes them); a polybit checkpoint starts from its own codes, scales and ratios. Either way the
    first training step sees exactly the quantized model. The presets' names work with `nn.switch.use`. Only what
    `freedom` names is trained. Raises PolybitError for presets no stored weight can serve and for unknown layers.
    """
    freedom = freedom or Freedom()
    freedom = replace(freedom, codes=freedom.codes or ("own" if adapter == "nested" else "shared"))
    if freedom.chained and (freedom.codes == "own" or adapter != "none" or freedom.scales != "frozen"):
        raise PolybitError(
            "chained widths train the bits of one shared code: use codes shared, scales frozen and no adapter with them"
        )
    layers = chosen_layers(model, presets)
    if adapter == "nested" and freedom.codes == "shared":
        raise PolybitError(
            "nested adapters give every width weights of its own, which one shared code cannot hold: "
            'use codes "own", or adapter "lora" or "none"'
        )
    for parameter in model.parameters():
        chosen = parameter.ndim == 1 if freedom.others == "norms" else bool(freedom.others)
        parameter.requires_grad_(chosen and parameter.is_floating_point())
    made, draw = {}, torch.Generator().manual_seed(freedom.seed)  # alike in every process of a run
    for name, (target, weight_OI, stored) in track(list(layers.items()), "preparing", total=len(layers)):
        widths = sorted({plan.at(name).w for plan in presets.values()}, reverse=True)
        given = (start or {}).get(name, stored)
        layer = LatentLinear(target, weight_OI, getattr(model.get_submodule(name), "bias", None))
        fill(layer, widths, given, Grid(widths[0], group_size, zero), freedom)
        if adapter == "nested":
            layer.nested = NestedAdapter(target.rows, target.columns, freedom.rank, weight_OI, draw)
        for preset in presets if adapter == "lora" else ():
            layer.loras[preset] = Lora(target.rows, target.columns, freedom.rank, weight_OI, draw=draw)
        layer.latent_OI.requires_grad_(freedom.base and not freedom.chained)
        if layer.bias is not None:
            layer.bias.requires_grad_(bool(freedom.others))
        place(model, name, layer)
        made[name] = layer
    board = board_of(model)
    board.converted(made)
    board.layers = dict(made)
    board.presets = {name: trimmed(plan, made) for name, plan in presets.items()}
    board.adapted |= {name: layer for name, layer in made.items() if layer.loras}
    return use(model, next(iter(presets)))


def fill(layer: LatentLinear, widths: list[int], given: QWeight | None, grid: Grid, freedom: Freedom) -> None:
    """Give a layer its codes, and its latent weight the place inside the cells of the start."""
    weight_OI = layer.source_OI
    if freedom.codes == "own" and len(widths) > 1:
        for width in widths:
            narrow = replace(grid, bits=width)
            layer.codes[str(width)] = Code(rtn(weight_OI, None, narrow), freedom.scales, narrow)
        return
    if given is None:
        given = quick_start(weight_OI, grid, widths[:1] if freedom.scales == "recomputed" else widths)
    if given.bits < widths[0]:
        raise PolybitError(
            f"layer {layer.target.name!r:.120} starts from {given.bits} bits, a preset wants {widths[0]}: "
            "start from a wider checkpoint"
        )
    stored = Grid(given.bits, given.group_size, grid.zero)
    if freedom.chained:
        at_start_OI = given.dequantize() if freedom.margin else weight_OI
        layer.codes[str(given.bits)] = Chain(given, stored, freedom.chained, at_start_OI)
        return
    code = Code(given, freedom.scales, stored)
    layer.codes[str(given.bits)] = code
    if freedom.scales == "recomputed":
        if not freedom.margin:
            return
        given = code.encode(weight_OI)
    scaled_OI = start_latents(given, weight_OI)
    if freedom.margin:
        codes_OI, room = given.codes_OI.float(), max(0.5 - freedom.margin, 0.0)
        scaled_OI = torch.minimum(torch.maximum(scaled_OI, codes_OI - room), codes_OI + room)
    latent_OI = in_weight_units(scaled_OI, given)
    if freedom.scales == "recomputed":  # the ends of a group are its scale, and only what lies on a border has to move
        on_border_OI = (start_latents(given, weight_OI) - given.codes_OI.float()).abs() > 0.5 - ON_BORDER
        moves_OI = on_border_OI & ~ends_of_groups(weight_OI, given.group_size)
        latent_OI = torch.where(moves_OI, latent_OI, weight_OI.float())
    layer.latent_OI.data.copy_(latent_OI)


def ends_of_groups(weight_OI: Tensor, group_size: int) -> Tensor:
    """True for the least and the largest weight of each group, [O, I]."""
    groups_OGL, _ = split_groups(weight_OI.float(), group_size)
    ends_OGL = (groups_OGL == groups_OGL.amin(-1, keepdim=True)) | (groups_OGL == groups_OGL.amax(-1, keepdim=True))
    return ends_OGL.flatten(1)[:, : weight_OI.shape[1]]


def in_weight_units(position_OI: Tensor, q: QWeight) -> Tensor:
    """Latent positions in codes -> float weights, s (u - z) times the column scale."""
    floating = replace(q, codes_OI=torch.zeros_like(q.codes_OI), ratios={})
    step_OI = replace(floating, codes_OI=torch.ones_like(q.codes_OI)).dequantize() - floating.dequantize()
    return floating.dequantize() + step_OI * position_OI


Layers = dict[str, tuple[Target, Tensor, QWeight | None]]


def chosen_layers(model: nn.Module, presets: Mapping[str, Plan]) -> Layers:
    """Name -> (target, float weight, codes it has already) of every layer the presets quantize, checked."""
    if not presets:
        raise PolybitError("training needs at least one preset, such as A=w8a8")
    if FLOAT_PRESET in presets:
        raise PolybitError(f"{FLOAT_PRESET!r} is the float model, no preset can have its name: call it otherwise")
    found: Layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            q = unpack(layer.planes)
            found[name] = Target(name, layer.kind, layer.rows, layer.columns), q.dequantize(), q  # type: ignore[arg-type]
    for target in targets(model) if not found else ():
        if target.kind == "experts":
            raise PolybitError(f"{target.name!r:.120} holds fused experts, which are not trained: use dense models")
        found[target.name] = target, target.weight_OI(model), None
    for preset, plan in presets.items():
        plan.check_names(found)
        if plan.columns:
            raise PolybitError(f"preset {preset!r:.60} has widths inside layers: train with one width per layer")
    return {name: entry for name, entry in found.items() if is_quantized(name, presets)}


def is_quantized(name: str, presets: Mapping[str, Plan]) -> bool:
    """Whether the presets quantize a layer; all of them must, or none."""
    floats = [preset for preset, plan in presets.items() if plan.at(name).w == FLOAT]
    if floats and len(floats) < len(presets):
        raise PolybitError(
            f"preset {floats[0]!r:.60} leaves layer {name!r:.120} in float and others quantize it, which no shared "
            "planes can serve: give it a width of 8 bits or less in every preset, or float in all"
        )
    return not floats


def trimmed(plan: Plan, layers: Iterable[str]) -> Plan:
    """The plan without the layers that stay in float whatever the preset."""
    return replace(plan, layers={name: plan.layers[name] for name in plan.layers if name in set(layers)})


def latent_layers(model: nn.Module) -> dict[str, LatentLinear]:
    """The trainable layers of a model by name."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LatentLinear)}
    if not found:
        raise PolybitError("the model has no trainable quantized layer: call make_trainable first")
    return found


def quantized_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the trainable layers."""
    return tuple(latent_layers(model))


@torch.no_grad()
def qweight(layer: LatentLinear, width: int) -> QWeight:
    """The codes of a layer as they will be stored, for reading at `width` bits and what shares its code."""
    return layer.code(width).encode(layer.full(width))


def settle(model: nn.Module, stats: Mapping[str, LayerStats]) -> None:
    """After training chained widths: the bits only wider presets read, chosen again for the least output error.

    stats: what calibration saw at each layer; a layer without them takes plain squared error.
    """
    widths = {plan.at(name).w for plan in board_of(model).presets.values() for name in stats}
    for name, layer in track(list(latent_layers(model).items()), "settling"):
        for code in layer.codes.values():
            if isinstance(code, Chain):
                code.settle(layer.source_OI, stats.get(name), sorted(widths, reverse=True))


def freeze(model: nn.Module, preset: str | None = None) -> nn.Module:
    """Turn a trained model, in place, into a pure quantized one whose logits are those of the training forward.

    With shared codes all presets stay and are saved with the checkpoint. With own codes a `preset` must be named when
    there are several widths; it stays, with the presets that read the same widths. LoRA adapters are attached.
    """
    layers, board = latent_layers(model), board_of(model)
    if preset is not None and preset not in board.presets:
        raise PolybitError(f"there is no preset {preset!r:.60}: choose one of {', '.join(board.presets)}")
    kept, stored = dict(board.presets), {}
    for name, layer in layers.items():
        widths = {plan.at(name).w for plan in kept.values()}
        if len(layer.codes) > 1 and len(widths) > 1:
            if preset is None:
                raise PolybitError(f"every width has codes of its own: name one preset of {', '.join(board.presets)}")
            wanted = board.presets[preset].at(name).w
            kept = {key: plan for key, plan in kept.items() if plan.at(name).w == wanted}
    for name, layer in layers.items():
        planes = pack(qweight(layer, max(plan.at(name).w for plan in kept.values())))
        stored[name] = (layer.target, Fields.of(planes), tensors_of(planes))
    loras = {name: dict(layer.loras.items()) for name, layer in layers.items() if layer.loras}
    install(model, stored)
    model.save_pretrained = refuse_save  # type: ignore[assignment]
    set_presets(model, kept)
    if loras:
        plug(model, loras)  # type: ignore[arg-type]
    return model
