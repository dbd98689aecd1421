"""Quantized layers: a linear layer, an embedding, an output head tied to it, and fused experts, at any stored width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear as dense

from polybit.core.affine import QWeight, fake_quantize_tokens
from polybit.core.plan import ColumnWidths
from polybit.core.planes import COLUMNS, ROWS, Planes, parts, ratio_levels, read_widths, storage_order
from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.kernels import ops
from polybit.kernels.adapter import Adapter
from polybit.kernels.prepared import Holder, Prepared
from polybit.kernels.route import Arithmetic, Route, route
from polybit.nn.fields import Fields, tensors_of

PREPARED = ("compiled", "few")  # ways of a weight whose kernels were handed it once


class QuantWeight(nn.Module):
    """One stored weight and the precision it is read at now.

    Switching is setting `precision`; nothing is copied or decoded ahead of time. With `keep` the decoded weight of the
    current width stays in memory (4 bytes per weight), which pays for many small batches on a CPU. The parameters are
    the stored tensors of docs/format.md, without gradient; made without `tensors` they are empty, to be loaded.
    """

    qplanes: Tensor

    def __init__(self, fields: Fields, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.fields = fields
        for name, (shape, dtype) in fields.tensors().items():
            value = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name]
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.precision: Precision = Precision()
        self.offsets: ColumnWidths | None = (
            None  # what blocks of input columns add to the width, set with the precision
        )
        self.widths: tuple[int, ColumnWidths, tuple[int, ...]] | None = None  # the last ones worked out
        self.keep: bool = False
        self.kept: tuple[int | tuple[int, ...], Tensor] | None = None
        self.kind = "linear"  # how the float model stored this weight; told by whoever puts the layer in place
        self.arithmetic: Arithmetic = "float"
        self.holder = Holder()

    @classmethod
    def of(cls, planes: Planes, *rest: Any) -> Any:
        """The module that reads `planes`; it shares their memory."""
        return cls(Fields.of(planes), tensors_of(planes), *rest)

    @property
    def planes(self) -> Planes:
        """The stored weight as the kernels read it; shares the parameters' memory."""
        return self.fields.planes(self._parameters)  # type: ignore[arg-type]

    @property
    def bits(self) -> int:
        """The widest width that is stored."""
        return self.fields.bits

    @property
    def width(self) -> int:
        """The width the weight is read at now; a float precision reads all stored bits."""
        return self.fields.bits if self.precision.w == FLOAT else self.precision.w

    @property
    def reading(self) -> int | tuple[int, ...]:
        """What the weight is read at now: a width, or one per group where blocks of columns have offsets."""
        if self.offsets is None:
            return self.width
        width, found = self.width, self.widths
        if found is None or found[0] != width or found[1] is not self.offsets:
            fields = self.fields
            each = self.offsets.group_widths(width, fields.shape[1], fields.group_size, most=fields.bits)
            found = self.widths = (width, self.offsets, each)
        return found[2]

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0 = a whole row."""
        return self.fields.group_size

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.fields.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.fields.shape[1]

    def set_precision(self, precision: Precision, offsets: ColumnWidths | None = None) -> None:
        """Read the weight so from now on, and let a kept one go; past nn.Module's slow attribute hook."""
        state = self.__dict__
        state["precision"] = precision
        state["offsets"] = offsets
        state["kept"] = None

    def decode(self) -> Tensor:
        """The weight in float32 [O, I] as it is read now, from memory when it is kept."""
        reading = self.reading
        if not self.keep:
            return ops.decode(self.planes, reading)
        stale = self.kept is None or self.kept[0] != reading or self.kept[1].device != self.qplanes.device
        if stale:
            self.kept = (reading, ops.decode(self.planes, reading))
        assert self.kept is not None
        return self.kept[1]

    def round_input(self, x: Tensor) -> Tensor:
        """The input at the precision's activation bits."""
        bits = self.precision.a
        return x if bits == FLOAT else fake_quantize_tokens(x.float(), bits).to(x.dtype)

    def way(self, x: Tensor) -> Route:
        """How x is multiplied, as far as the layer can tell; the prepared weight looks closer."""
        device = "cuda" if x.is_cuda else "cpu"
        return route(self.arithmetic, device, watched=type(x) is not Tensor or is_compiling(), kept=self.keep)

    def is_fast(self, x: Tensor) -> bool:
        """Whether an input may go straight to the prepared weight."""
        return self.way(x) in PREPARED

    def prepared(self) -> Prepared:
        """The weight as the compiled kernels have it."""
        return self.holder.get(self._parameters.values(), lambda: self.planes)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias at the current precision, in x's dtype."""
        x = self.round_input(x)
        way = self.way(x)
        if way in PREPARED:
            return self.prepared().linear(x, self.reading, bias, self.arithmetic)
        if way == "kept":
            y = dense(x.float(), self.decode(), None if bias is None else bias.float())
            return y.to(x.dtype)
        return ops.linear(x, self.planes, self.reading, bias, arithmetic=self.arithmetic)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        size = self.fields.group_size or "row"
        return f"{self.columns}, {self.rows}, stored bits={self.bits}, group={size}, now={self.precision}"


class QuantLinear(QuantWeight):
    """A linear layer with a stored weight; takes the place of nn.Linear and of GPT-2's Conv1D."""

    bias: nn.Parameter | None

    def __init__(
        self, fields: Fields, tensors: Mapping[str, Tensor] | None = None, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(fields, tensors)
        self.in_features, self.out_features = fields.shape[1], fields.shape[0]
        self.register_parameter("bias", bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

        self.adapters: dict[str, Adapter] = {}  # by preset; no part of the stored weight
        self.adapter: Adapter | None = None  # the one in use
        self.siblings: Any = None  # layers that share their input, see nn/fuse.py

    def set_adapter(self, preset: str, down_RI: Tensor, up_OR: Tensor, scale: float = 1.0) -> None:
        """Give a preset a low-rank part: y += scale * up (down x), of the input before it is rounded.

        The factors are held by reference and are no part of the layer's state. `wear` puts it to use.
        """
        adapter = Adapter(down_RI, up_OR, scale)
        if (adapter.rows, adapter.columns) != (self.rows, self.columns):
            raise PolybitError(
                f"the adapter is for shape {(adapter.rows, adapter.columns)}, the layer has "
                f"{(self.rows, self.columns)}: use the adapters of this model"
            )
        self.adapters[preset] = adapter

    def wear(self, preset: str | None) -> None:
        """Use the adapter of a preset; None, or a preset without one: none."""
        self.__dict__["adapter"] = self.adapters.get(preset) if preset is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in x's dtype."""
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias and the adapter's part at the current precision, in x's dtype; with siblings in one call."""
        if self.siblings is not None:
            shared = self.siblings.multiply(self, x)
            if shared is not None:
                return shared
        adapter = self.adapter
        if adapter is None:
            return super().multiply(x, bias)
        if self.precision.a == FLOAT and self.is_fast(x) and not adapter.trains():
            return self.prepared().linear(x, self.reading, bias, self.arithmetic, adapter)
        y = super().multiply(x, bias)
        return (y.float() + adapter.product(x)).to(y.dtype)


class QuantEmbedding(QuantWeight):
    """An embedding whose rows are decoded as they are looked up."""

    like: Tensor

    def __init__(self, fields: Fields, tensors: Mapping[str, Tensor] | None, like: Tensor) -> None:
        super().__init__(fields, tensors)
        self.num_embeddings, self.embedding_dim = fields.shape
        # Carries the float type the rows come out in, and follows model.to(dtype).
        self.register_buffer("like", like.new_empty(0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> rows [..., I]."""
        if self.keep:
            return self.decode()[ids].to(self.like.dtype)
        reading = self.reading
        at = reading if isinstance(reading, int) else torch.tensor(reading)
        rows = gather_rows(self.planes, ids.reshape(-1), reading).dequantize(at)
        return rows.to(self.like.dtype).view(*ids.shape, self.columns)


class TiedHead(nn.Module):
    """An output head that reads the weight and the precision of a QuantEmbedding; it stores nothing but its bias."""

    bias: nn.Parameter | None

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.source = (embedding,)  # a tuple, so that the weight is registered and saved once
        self.in_features, self.out_features = embedding.columns, embedding.rows
        self.register_parameter("bias", bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., vocabulary]."""
        return self.source[0].multiply(x, self.bias)


class QuantExperts(nn.Module):
    """Fused experts of a mixture (Mixtral, Qwen-MoE and their kin), each expert's rows read from one stored weight.

    The arithmetic is the eager path of transformers 5: for every expert that was chosen, act(gate) * up, then down,
    weighted by the router and summed.
    """

    def __init__(self, gate_up_proj: QuantWeight, down_proj: QuantWeight, experts: int, source: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        # What the family's own gating reads (limits, slopes) are plain numbers of the module.
        for name, value in vars(source).items():
            if isinstance(value, (bool, int, float)) and name != "training" and not name.startswith("_"):
                setattr(self, name, value)
        self.num_experts = experts
        self.act_fn = source.act_fn
        self.gating: Callable[..., Tensor] = getattr(type(source), "_apply_gate", plain_gate)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, D], chosen experts [T, k] and their weights [T, k] -> [T, D]."""
        output_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            wide = self.one_expert(self.gate_up_proj, hidden_states[token], expert)
            narrow = self.one_expert(self.down_proj, self.gating(self, wide), expert)
            weighted = narrow * top_k_weights[token, place, None]
            output_TD.index_add_(0, token, weighted.to(output_TD.dtype))
        return output_TD

    def one_expert(self, weight: QuantWeight, x: Tensor, expert: int) -> Tensor:
        """x times the transposed matrix of one expert."""
        rows = weight.rows // self.num_experts
        start, stop = expert * rows, (expert + 1) * rows
        x = weight.round_input(x)
        if weight.keep:
            return dense(x.float(), weight.decode()[start:stop]).to(x.dtype)
        part, skipped = slice_rows(weight.planes, start, stop)
        return ops.linear(x, part, weight.reading, arithmetic=weight.arithmetic)[..., skipped : skipped + rows]


def plain_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """act(gate) * up for halves laid side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def slice_rows(planes: Planes, start: int, stop: int) -> tuple[Planes, int]:
    """The whole blocks of 16 rows that hold rows start..stop, and how many rows of theirs come before `start`."""
    first, last = start // ROWS, -(-stop // ROWS)
    rows = min(planes.shape[0], last * ROWS) - first * ROWS
    cut = slice(first, last)
    if planes.bits_G is None:
        codes = planes.planes[:, cut]
    else:  # parts follow each other, so that what is cut out of them is copied
        codes = torch.cat([part.planes[:, cut].flatten() for part in parts(planes)])
    tables = {
        width: table if table.index is None else replace(table, index=table.index[cut])
        for width, table in planes.ratios.items()
    }
    zero = planes.zero[cut] if isinstance(planes.zero, Tensor) else planes.zero
    part = replace(
        planes,
        planes=codes,
        scale=planes.scale[cut],
        zero=zero,
        shape=(rows, planes.shape[1]),
        ratios=tables,
    )
    return part, start - first * ROWS


def gather_rows(planes: Planes, ids: Tensor, width: int | Sequence[int]) -> QWeight:
    """The rows `ids` [T] of a stored weight, reading only their bytes of `width` planes (the most of several)."""
    widths = {width} if isinstance(width, int) and planes.bits_G is None else set(read_widths(planes, width))
    width = max(widths)
    block, row = ids // ROWS, ids % ROWS
    bits_G: Tensor | None = None
    order: Tensor | slice = slice(None)
    if planes.bits_G is None:
        codes_TI = gather_codes(planes.planes[:width], block, row)[:, : planes.shape[1]] << (planes.bits - width)
    else:
        codes_TI = torch.zeros(len(ids), planes.shape[1], dtype=torch.uint8, device=ids.device)
        for part in parts(planes):
            read = min(width, part.bits)
            held = gather_codes(part.planes[:read], block, row)[:, : len(part.columns_P)]
            codes_TI[:, part.columns_P] = held << (part.bits - read)
        bits_G = torch.tensor(planes.bits_G, dtype=torch.uint8, device=ids.device)
        order = torch.tensor(storage_order(planes.bits_G), device=ids.device).argsort()
    zero = (
        planes.zero[block, :, row].float()[:, order] if isinstance(planes.zero, Tensor) else torch.tensor(planes.zero)
    )
    ratios = {}
    for narrower in widths & set(planes.ratios):
        table = planes.ratios[narrower]
        if table.index is None:
            ratios[narrower] = torch.tensor(table.low, device=ids.device)
            continue
        pair = table.index[block, :, row % 8]
        nibble = torch.where((row < 8)[:, None], pair & 15, pair >> 4)[:, order]
        ratios[narrower] = ratio_levels(table.low, table.high).to(ids.device)[nibble.long()]
    column_scale = None if planes.column_scale is None else planes.column_scale.float()
    scale = planes.scale[block, :, row].float()[:, order] * planes.gain
    return QWeight(codes_TI, scale, zero.to(ids.device), planes.bits, planes.group_size, ratios, column_scale, bits_G)


def gather_codes(planes: Tensor, block: Tensor, row: Tensor) -> Tensor:
    """Codes of some rows (block of 16, row in it) from planes [b, O/16, I/32, 64], uint8 [T, I]."""
    lanes = 4 * row[:, None] + torch.arange(4, device=row.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=row.device)
    codes = torch.zeros(len(row), planes.shape[2], 4, 8, dtype=torch.uint8, device=row.device)
    for plane in planes:
        bytes_TC4 = plane[block].gather(2, lanes[:, None, :].expand(-1, plane.shape[1], -1))
        codes = (codes << 1) | ((bytes_TC4.unsqueeze(-1) >> shifts) & 1)
    return codes.transpose(2, 3).reshape(len(row), planes.shape[2] * COLUMNS)
