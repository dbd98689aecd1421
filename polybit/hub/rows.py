"""Read rows of tokens, many sequences and many widths in one step: what a server and a batched evaluation run on.

A row is one token of one sequence, which lives in a slot of the cache. The rows of a step may belong to different
sequences, be several neighbouring tokens of one (a prompt, a draft to verify), and be read at different precisions. The
numbers of a row do not depend on what else is in the step, bit for bit: an answer is the same alone and in a crowd.

    decoder = RowDecoder(model, slots=8, room=512)
    four = decoder.setting("w4")
    hidden_RD = decoder.step([TokenRows(four, slot=0, start=0, tokens=prompt)])
    logits_1V = decoder.logits(hidden_RD[-1:], four)

Llama-like decoders on a CPU (Llama, Mistral, Qwen2, Qwen3), their blocks quantized; `supported` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense

from polybit.core.precision import FLOAT
from polybit.core.runtime import PolybitError
from polybit.hub.families import is_known
from polybit.kernels import cpu, ops
from polybit.kernels.prepared import DIGITS, Bundle, Prepared
from polybit.nn.attention import operands_of
from polybit.nn.linear import QuantEmbedding, QuantLinear, QuantWeight, TiedHead, gather_rows, slice_rows
from polybit.nn.switch import Wanted, as_it_was, use

NARROW = 4  # bits up to which int8 inputs add less than 2 % to the KL the weights cost
KEYS = 16  # tokens whose keys lie side by side in the cache (kernels/csrc/decoder.h)
SHORT = 16384  # tokens among which a draft is chosen: vocabularies are in the order of merges, frequent tokens first
CLOSE = 2.0  # nats to the likeliest at 4 bits: tokens that may be likeliest at the head's own width
FEW = 16  # of them that are looked at


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Neighbouring tokens of one sequence: read at `setting`, into `slot`, the first at position `start`."""

    setting: int
    slot: int
    start: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Setting:
    """How the embedding and the head are read at one precision (a width, or one per group), and the head's input.

    tokens: how many of the first ones the head is read for · exact: how the head is read again for the likeliest ones.
    """

    embedding: int | tuple[int, ...] | None
    head: int | tuple[int, ...] | None
    arithmetic: ops.Arithmetic
    tokens: int
    exact: int | None = None


class RowDecoder:
    """Reads rows of up to `slots` sequences of at most `room` tokens each; `supported` must have said yes.

    blocks: how many of the first blocks are read; None = all. The cache is laid out for all slots at once, and costs
    memory only where it was written.
    """

    def __init__(self, model: nn.Module, *, slots: int, room: int, blocks: int | None = None) -> None:
        config: Any = model.config
        inner: Any = model.model
        library = cpu.library()
        assert library is not None
        self.model, self.slots, self.room = model, slots, room
        self.embedding: Any = inner.embed_tokens
        self.head: Any = model.lm_head
        heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        size, hidden = int(inner.layers[0].self_attn.head_dim), int(config.hidden_size)
        cosine, sine = inner.rotary_emb(torch.zeros(1, 1, hidden), torch.arange(room)[None])
        self.hidden, eps = hidden, float(config.rms_norm_eps)
        # the compiled decoder holds addresses only: what it reads is kept here
        self.cosine_TD, self.sine_TD = cosine[0].float().contiguous(), sine[0].float().contiguous()
        places = -(-room // KEYS) * KEYS
        # zeros, which cost no memory before they are written: what lies behind a text is read, and counts for nothing
        read = inner.layers[:blocks]
        self.cache = [torch.zeros(2, slots, kv_heads, places, size) for _ in read]
        turned, middle = self.cosine_TD.shape[1], int(config.intermediate_size)
        self.compiled = library.Decoder(
            [heads, kv_heads, size, turned, room, slots, hidden, middle],
            eps,
            self.cosine_TD.data_ptr(),
            self.sine_TD.data_ptr(),
            inner.norm.weight.data_ptr(),
        )
        self.products: list[list[QuantLinear]] = []
        for layer, cache in zip(read, self.cache, strict=True):
            self.add_block(layer, cache)
        self.settings: list[Setting] = []
        self.known: dict[tuple[str, str, bool], int] = {}
        self.short: Prepared | None = None  # the head's first tokens

    def add_block(self, layer: Any, cache: Tensor) -> None:
        """Hand one decoder block over to the compiled decoder."""
        attention, products = layer.self_attn, products_of(layer)
        prepared = [product.prepared() for product in products]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        places = [0 if norm is None else norm.weight.data_ptr() for norm in norms]
        window = int(getattr(attention, "sliding_window", getattr(self.model.config, "sliding_window", None)) or 0)
        shares = [Bundle.fits(prepared[:3])] * 3 + [True] + [Bundle.fits(prepared[4:6])] * 2 + [True]
        biases = [product.bias for product in products]
        self.compiled.add_block(
            [*places, cache[0].data_ptr(), cache[1].data_ptr()],
            window,
            float(attention.scaling),
            [p.layer for p in prepared],
            [0 if bias is None else bias.data_ptr() for bias in biases],
            [0 if bias is None else cpu.TYPES[bias.dtype] for bias in biases],
            shares,
        )
        self.products.append(products)

    def setting(self, wanted: Wanted, arithmetic: str = "auto", *, draft: bool = False) -> int:
        """The number of a precision, made at its first use: any that `use` takes and the compiled kernels read.

        arithmetic: how inputs are rounded, "int8", "int16", or "auto" = int8 for weights of 4 bits and fewer · draft:
        int8 unless int16 is asked for, and the head is read for the first `SHORT` tokens, at 4 bits at most, and at its
        own bits for those that come close: enough to propose one. The model's own precision is left as it was.
        """
        arithmetic = "int8" if draft and arithmetic == "auto" else arithmetic
        key = (str(wanted), arithmetic, draft)
        if key not in self.known:
            with as_it_was(self.model):
                use(self.model, wanted)
                self.known[key] = self.add_setting(key[0], arithmetic, draft)
        return self.known[key]

    def add_setting(self, name: str, arithmetic: str, draft: bool) -> int:
        """Note what every layer is read at now."""
        layers = [layer for row in self.products for layer in row]
        odd = [layer.precision for layer in layers if layer.precision.a != FLOAT]
        if odd:
            raise PolybitError(
                f"precision {name!r} rounds activations to {odd[0].a} bits, which rows cannot be read at: choose one "
                "with weights only, such as w4"
            )
        for operands in operands_of(self.model).values():
            if {operands.q, operands.k, operands.v} != {FLOAT}:
                raise PolybitError(
                    f"precision {name!r} rounds queries, keys or values ({operands}), which rows cannot be read at: "
                    "choose one with weights only, such as w4"
                )

        def mode(layer: QuantWeight) -> ops.Arithmetic:
            return ("int8" if layer.width <= NARROW else "int16") if arithmetic == "auto" else arithmetic  # type: ignore

        numbers = [layer.prepared().number(layer.reading) for layer in layers]
        adapters = [None if layer.adapter is None else layer.adapter.for_kernels() for layer in layers]
        number = self.compiled.add_reading(numbers, [DIGITS[mode(layer)] for layer in layers], adapters)
        assert number == len(self.settings)
        embedding, head = quantized(self.embedding), quantized(self.head)
        reading = None if head is None else head.reading
        headed: ops.Arithmetic = "int16" if head is None else mode(head)
        exact: int | None = None
        if draft and isinstance(reading, int) and reading > NARROW:
            reading, headed, exact = NARROW, "int8", reading
        tokens = int(self.model.config.vocab_size) if not draft or isinstance(reading, tuple) else SHORT  # type: ignore
        self.settings.append(Setting(None if embedding is None else embedding.reading, reading, headed, tokens, exact))
        return number

    @torch.inference_mode()
    def step(self, parts: Sequence[TokenRows]) -> Tensor:
        """Read all rows; the normed hidden state of each, [R, D] in the order given, for `logits`.

        Parts of one setting are cheapest as neighbours. A slot may occur twice only with the same setting, in order.
        """
        settings: list[int] = []
        counts: list[int] = []
        slots: list[int] = []
        places: list[int] = []
        tokens: list[list[int]] = []  # of each setting's rows
        for part in parts:
            count = len(part.tokens)
            if settings and settings[-1] == part.setting:
                counts[-1] += count
            else:
                settings.append(part.setting)
                counts.append(count)
                tokens.append([])
            tokens[-1] += part.tokens
            slots += [part.slot] * count
            places += range(part.start, part.start + count)
        hidden = [self.embed(*each) for each in zip(tokens, settings, strict=True)]
        hidden_RD = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        out_RD = torch.empty_like(hidden_RD)
        self.compiled.step(settings, counts, slots, places, hidden_RD.data_ptr(), out_RD.data_ptr())
        return out_RD

    def embed(self, tokens: Sequence[int], setting: int) -> Tensor:
        """Embeddings [T, D] of some tokens as the setting reads them, float32, in memory of their own."""
        module = self.embedding
        if not isinstance(module, QuantEmbedding):
            return module(torch.tensor(tokens)).float()
        reading = self.settings[setting].embedding
        assert reading is not None
        prepared = module.prepared()
        if prepared.layer is None:
            at = reading if isinstance(reading, int) else torch.tensor(reading)
            return gather_rows(module.planes, torch.tensor(tokens), reading).dequantize(at).float()
        rows_TD = torch.empty(len(tokens), prepared.columns)
        prepared.layer.decode_rows(prepared.number(reading), list(tokens), rows_TD.data_ptr())
        return rows_TD

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor, setting: int) -> Tensor:
        """Logits [R, V] of rows of `step` at the setting they were read at, float32.

        Of a draft, [R, SHORT] at most, and -inf for tokens that are not close to the likeliest.
        """
        source, given, bias = quantized(self.head), self.settings[setting], self.head.bias
        weight: Any = self.head.weight if source is None else None
        rows = len(weight) if source is None else source.rows
        cut = given.tokens < rows
        if cut:
            bias = None if bias is None else bias[: given.tokens]
        if source is not None:
            assert given.head is not None
            prepared = self.short_head(source) if cut else source.prepared()
            logits_RV = prepared.linear(hidden_RD, given.head, bias, given.arithmetic)
            if given.exact is None or prepared.layer is None:
                return logits_RV
            return refined(logits_RV, hidden_RD, prepared, given.exact, bias)
        # one by one: a dense product of several rows may add up in another order than that of one
        weight = weight[: given.tokens] if cut else weight
        return torch.cat([dense(row_1D, weight, bias) for row_1D in hidden_RD.split(1)])

    def short_head(self, source: QuantWeight) -> Prepared:
        """The head's first `SHORT` tokens, in the memory of the whole."""
        if self.short is None:
            self.short = Prepared(slice_rows(source.planes, 0, SHORT)[0])
        return self.short

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first `length` tokens of another: both then hold the same beginning."""
        self.compiled.copy(source, target, length)

    def nbytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return sum(cache[:, 0, :, 0].numel() * cache.element_size() for cache in self.cache)


def refined(logits_RV: Tensor, hidden_RD: Tensor, head: Prepared, width: int, bias: Tensor | None) -> Tensor:
    """Logits of the tokens that come close to the likeliest, with the head's rows at another width; -inf of others.

    In numpy, whose calls cost less than torch's: this stands between two steps of a draft.
    """
    found_RV = np.full(logits_RV.shape, -np.inf, dtype=np.float32)
    for logits_V, hidden_D, out_V in zip(logits_RV.numpy(), hidden_RD.numpy(), found_RV, strict=True):
        close_N = np.flatnonzero(logits_V >= logits_V.max() - CLOSE)
        if len(close_N) > FEW:
            close_N = close_N[np.argpartition(-logits_V[close_N], FEW)[:FEW]]
        rows_ND = np.empty((len(close_N), head.columns), dtype=np.float32)
        head.layer.decode_rows(width, close_N.tolist(), rows_ND.ctypes.data)
        out_V[close_N] = rows_ND @ hidden_D
        if bias is not None:
            out_V[close_N] += bias[close_N].float().numpy()
    return torch.from_numpy(found_RV)


def quantized(module: nn.Module) -> QuantWeight | None:
    """The stored weight behind an embedding or a head; None for a float one."""
    if isinstance(module, TiedHead):
        return module.source[0]
    return module if isinstance(module, QuantWeight) else None


def supported(model: nn.Module) -> bool:
    """Whether `RowDecoder` computes what the model's own forward pass computes: every product is a compiled one."""
    if cpu.library() is None or not is_known(model):
        return False
    inner: Any = model.model
    products = [product for block in inner.layers for product in products_of(block)]
    return all(type(product) is QuantLinear and product.prepared().layer is not None for product in products)


def products_of(block: Any) -> list[Any]:
    """The seven linear layers of a decoder block, in the order they run."""
    attention, mlp = block.self_attn, block.mlp
    first = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*first, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
