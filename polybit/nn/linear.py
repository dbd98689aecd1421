"""Quantized layers: a linear layer, an embedding, an output head tied to it, and fused experts, at any stored width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense

from polybit.core.affine import QWeight, fake_quantize_tokens
from polybit.core.planes import COLUMNS, ROWS, Planes, ratio_levels
from polybit.core.precision import FLOAT, Precision
from polybit.kernels import ops
from polybit.kernels.prepared import Holder
from polybit.nn.fields import Fields, tensors_of


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
        self.keep: bool = False
        self.kept: tuple[int, Tensor] | None = None
        self.kind = "linear"  # how the float model stored this weight; told by whoever puts the layer in place
        self.activations: ops.Activations = "float"
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
    def rows(self) -> int:
        """Number of outputs."""
        return self.fields.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.fields.shape[1]

    def decode(self) -> Tensor:
        """The weight in float32 [O, I] at the current width, from memory when it is kept."""
        if not self.keep:
            return ops.decode(self.planes, self.width)
        stale = self.kept is None or self.kept[0] != self.width or self.kept[1].device != self.qplanes.device
        if stale:
            self.kept = (self.width, ops.decode(self.planes, self.width))
        assert self.kept is not None
        return self.kept[1]

    def round_input(self, x: Tensor) -> Tensor:
        """The input at the precision's activation bits."""
        bits = self.precision.a
        return x if bits == FLOAT else fake_quantize_tokens(x.float(), bits).to(x.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias at the current precision, in x's dtype."""
        x = self.round_input(x)
        if not self.keep:
            if self.activations == "float" or type(x) is not Tensor or torch.compiler.is_compiling():
                return ops.linear(x, self.planes, self.width, bias, activations=self.activations)
            prepared = self.holder.get(self._parameters.values(), lambda: self.planes)
            return prepared.linear(x, self.width, bias, self.activations)
        y = dense(x.float(), self.decode(), None if bias is None else bias.float())
        return y.to(x.dtype)

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

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in x's dtype."""
        return self.multiply(x, self.bias)


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
        rows = gather_rows(self.planes, ids.reshape(-1), self.width).dequantize(self.width)
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
        return ops.linear(x, part, weight.width, activations=weight.activations)[..., skipped : skipped + rows]


def plain_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """act(gate) * up for halves laid side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def slice_rows(planes: Planes, start: int, stop: int) -> tuple[Planes, int]:
    """The whole blocks of 16 rows that hold rows start..stop, and how many rows of theirs come before `start`."""
    first, last = start // ROWS, -(-stop // ROWS)
    rows = min(planes.shape[0], last * ROWS) - first * ROWS
    cut = slice(first, last)
    tables = {
        width: table if table.index is None else replace(table, index=table.index[cut])
        for width, table in planes.ratios.items()
    }
    zero = planes.zero[cut] if isinstance(planes.zero, Tensor) else planes.zero
    part = replace(
        planes,
        planes=planes.planes[:, cut],
        scale=planes.scale[cut],
        zero=zero,
        shape=(rows, planes.shape[1]),
        ratios=tables,
    )
    return part, start - first * ROWS


def gather_rows(planes: Planes, ids: Tensor, width: int) -> QWeight:
    """The rows `ids` [T] of a stored weight, reading only their bytes of `width` planes."""
    block, row = ids // ROWS, ids % ROWS
    lanes = 4 * row[:, None] + torch.arange(4, device=ids.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=ids.device)
    codes = torch.zeros(len(ids), planes.planes.shape[2], 4, 8, dtype=torch.uint8, device=ids.device)
    for plane in planes.planes[:width]:
        bytes_TC4 = plane[block].gather(2, lanes[:, None, :].expand(-1, plane.shape[1], -1))
        codes = (codes << 1) | ((bytes_TC4.unsqueeze(-1) >> shifts) & 1)
    codes_TI = codes.transpose(2, 3).reshape(len(ids), -1)[:, : planes.shape[1]] << (planes.bits - width)
    assert planes.planes.shape[2] * COLUMNS >= planes.shape[1]
    zero = planes.zero[block, :, row].float() if isinstance(planes.zero, Tensor) else torch.tensor(planes.zero)
    ratios = {}
    table = planes.ratios.get(width)
    if table is not None and table.index is not None:
        pair = table.index[block, :, row % 8]
        nibble = torch.where((row < 8)[:, None], pair & 15, pair >> 4)
        ratios[width] = ratio_levels(table.low, table.high).to(ids.device)[nibble.long()]
    elif table is not None:
        ratios[width] = torch.tensor(table.low, device=ids.device)
    column_scale = None if planes.column_scale is None else planes.column_scale.float()
    scale = planes.scale[block, :, row].float() * planes.gain
    return QWeight(codes_TI, scale, zero.to(ids.device), planes.bits, planes.group_size, ratios, column_scale)
