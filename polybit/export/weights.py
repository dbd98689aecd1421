"""What is exported: a model at one precision, each quantized weight as codes, steps and zero points of its groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.affine import expand_groups, tops, zero_points
from polybit.core.planes import Planes, row_parts, unpack
from polybit.core.runtime import PolybitError
from polybit.export.table import Exporter, holders
from polybit.hub.checkpoint import stored_tensors
from polybit.kernels.ops import decode
from polybit.nn.adapters import Lora
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import stored_layers

PART = 1 << 22  # weights that are decoded at once
Lend = Callable[[str], AbstractContextManager[None]]  # path -> while inside, the tensors below it are there


def there(_path: str) -> AbstractContextManager[None]:
    """Of a model that is in memory."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class ReadWeight:
    """One weight as it is read: step · (code − zero), both numbers of a group, exact in float64.

    codes_OI: uint8 below 2^bits · step_OG, zero_OG: float64 · group_size: columns of a group, never 0 · held: bits that
    the codes take in the format, `bits` or more.
    """

    name: str
    kind: str
    bits: int
    held: int
    group_size: int
    codes_OI: Tensor
    step_OG: Tensor
    zero_OG: Tensor

    @property
    def is_integer(self) -> bool:
        """Whether every zero point is a code."""
        inside = (self.zero_OG >= 0) & (self.zero_OG < 1 << self.held)
        return bool(((self.zero_OG == self.zero_OG.round()) & inside).all())

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and bias of every group in a float type, step · (code − zero) = scale · code + bias.

        The bias makes up for the rounding of the scale.
        """
        scale_OG = self.step_OG.to(dtype)
        mean_OG = self.codes_OI.double().unflatten(1, (-1, self.group_size)).mean(-1)
        bias_OG = (self.step_OG - scale_OG.double()) * mean_OG - self.step_OG * self.zero_OG
        return scale_OG, bias_OG.to(dtype)


@dataclass(frozen=True)
class Material:
    """A model at the precision it is exported at.

    layers: its quantized layers by name · adapters: low-rank parts to be folded into layers · dtype: float type of
    scales and of weights without codes · held: layer -> what an exporter wrote of it, filled while it writes · exact:
    a layer of which `dtype` moves a weight to another code has 32 bits instead · lend: what makes the tensors below a
    path be there, where the model is a skeleton.
    """

    model: nn.Module
    dtype: torch.dtype
    layers: Mapping[str, QuantWeight]
    adapters: Mapping[str, Lora] = field(default_factory=dict)
    tokenizer: Any = None
    held: dict[str, str] = field(default_factory=dict)
    exact: bool = False
    lend: Lend = there

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dtype: torch.dtype,
        adapters: Mapping[str, Lora] | None = None,
        tokenizer: Any = None,
        *,
        exact: bool = False,
        lend: Lend = there,
    ):
        """A model as it is switched now."""
        layers = stored_layers(model)
        for name, lora in (adapters or {}).items():
            shape = (lora.up_OR.shape[0], lora.down_RI.shape[1])
            if name not in layers or layers[name].fields.shape != shape:
                raise PolybitError(f"the adapter is for {name!r:.120} of shape {shape}, which this model has not")
        return cls(model, dtype, layers, adapters or {}, tokenizer, exact=exact, lend=lend)

    def floats(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is no part of a quantized weight, by its name in the model, in the type that is written."""
        codes = {f"{name}.{leaf}" for name, layer in self.layers.items() for leaf in layer.fields.tensors()}
        for name in [name for name, _ in stored_tensors(self.model) if name not in codes]:
            owner, _, leaf = name.rpartition(".")
            with self.lend(name):
                tensor = getattr(self.model.get_submodule(owner), leaf).detach()
            yield name, tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def decoded(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A quantized weight [O, I] as it is read, with its adapter folded in."""
        layer = self.layers[name]
        weight_OI = torch.empty(layer.rows, layer.columns, dtype=dtype)
        for rows, part_RI, _ in self.parts(name):
            weight_OI[rows] = part_RI
        return weight_OI

    def parts(self, name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, these rows of a quantized weight in float32 as it is read, the step of each of their weights); a step
        is what a difference is measured in."""
        layer, lora = self.layers[name], self.adapters.get(name)
        with self.lend(name):
            for rows, planes in row_parts(layer.planes, PART):
                weight_RI = decode(planes, layer.reading)
                if lora is not None:
                    weight_RI += lora.up_OR[rows].float() @ lora.down_RI.float() * (lora.alpha / len(lora.down_RI))
                read = read_planes(name, layer, planes)
                step_RI = expand_groups(read.step_OG.float().abs(), layer.columns, read.group_size)
                scale = planes.column_scale
                yield rows, weight_RI, step_RI if scale is None else step_RI * scale.float().abs()

    def read(self, name: str) -> ReadWeight:
        """A quantized weight as codes, steps and zero points; without column scales and adapters."""
        layer = self.layers[name]
        with self.lend(name):
            return read_planes(name, layer, layer.planes)

    def fit(self, name: str, exporter: Exporter, label: str) -> ReadWeight | None:
        """A weight in a width and groups that the format holds; None where the format has it decoded.

        label: what the user calls the format. Refuses what neither codes nor the format's own rule can hold.
        """
        layer = self.layers[name]
        if layer.kind not in exporter.kinds:
            return None
        reason = self.misfit(name, exporter, label)
        if reason is None:
            weight = regrouped(self.read(name), exporter)
            weight = replace(weight, held=min(w for w in exporter.widths if w >= weight.bits))
            if exporter.zero == "any" or weight.is_integer:
                return weight
            reason = (
                f"layer {name!r:.120} is read at {weight.bits} bits around a zero point that is no whole number, which "
                f"--to {label} cannot hold: choose --to {holders()}, or quantize with --bits and --asymmetric"
            )
        if exporter.else_decoded:
            return None
        raise PolybitError(reason)

    def misfit(self, name: str, exporter: Exporter, label: str) -> str | None:
        """Why a layer's grid does not fit the format, or None."""
        layer = self.layers[name]
        columns, size = layer.columns, layer.group_size
        if layer.planes.column_scale is not None:
            return (
                f"layer {name!r:.120} scales its columns (awq), which --to {label} cannot hold: use --to dense, or "
                "quantize with another --method"
            )
        if name in self.adapters:
            return f"an adapter folded into codes would be rounded away by --to {label}: use --to dense"
        if layer.width > max(exporter.widths):
            return (
                f"layer {name!r:.120} is read at {layer.width} bits, --to {label} holds up to {max(exporter.widths)}: "
                f"give --precision w{max(exporter.widths)} or less, or use --to dense"
            )
        if group_within(columns, size, exporter) is None:
            return (
                f"layer {name!r:.120} has {columns} columns in groups of {size or 'a whole row'}, --to {label} holds "
                f"groups of {', '.join(map(str, exporter.groups))}: quantize with --group-size {exporter.groups[0]}, "
                "or use --to dense"
            )
        return None


def read_planes(name: str, layer: QuantWeight, planes: Planes) -> ReadWeight:
    """A layer's weight, or some rows of it, as it is read now."""
    q = unpack(planes)
    reading = layer.reading
    read_G = q.read_widths(reading if isinstance(reading, int) else torch.tensor(reading))
    stored_G = q.stored_widths()
    shift_G = stored_G - read_G
    spread = lambda x: expand_groups(x, q.shape[1], q.group_size)  # noqa: E731
    codes_OI = q.codes_OI >> spread(shift_G[None].to(torch.uint8)).expand(q.shape)
    unit_OG = (2.0**shift_G).double().expand(q.scale_OG.shape)
    for width, ratio in q.ratios.items():
        unit_OG = torch.where((read_G == width) & (shift_G > 0), unit_OG * ratio.double(), unit_OG)
    offset_OG = tops(stored_G).double() / 2 - zero_points(q.zero, q.bits, q.bits_G).double()
    zero_OG = (tops(read_G).double() / 2 - offset_OG / unit_OG).expand_as(q.scale_OG)
    size = q.group_size or q.shape[1]
    bits = int(read_G.max())
    return ReadWeight(name, layer.kind, bits, bits, size, codes_OI, q.scale_OG.double() * unit_OG, zero_OG)


def group_within(columns: int, size: int, exporter: Exporter) -> int | None:
    """The largest group of a format that cuts groups of `size` (0 = a whole row) evenly, None where there is none."""
    size = size or columns
    if not exporter.groups or (exporter.rows and size == columns):
        return size
    fitting = [group for group in exporter.groups if columns % group == 0 and size % group == 0]
    return max(fitting, default=None)


def regrouped(weight: ReadWeight, exporter: Exporter) -> ReadWeight:
    """The same weight in the largest groups that the format holds; wider ones are cut."""
    columns = weight.codes_OI.shape[1]
    size = group_within(columns, weight.group_size, exporter)
    assert size is not None  # misfit was asked
    if size == weight.group_size:
        return weight
    times = weight.group_size // size
    cut = lambda x: x.repeat_interleave(times, dim=1)[:, : columns // size].contiguous()  # noqa: E731
    return replace(weight, group_size=size, step_OG=cut(weight.step_OG), zero_OG=cut(weight.zero_OG))
