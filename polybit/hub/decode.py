"""Write text token by token without transformers' work between the products: the fast path of one sequence on a CPU.

A Llama-like decoder (Llama, Mistral, Qwen2, Qwen3) reads one token as a dozen calls per block: the products through the
model's own layers at their present precision, everything between them compiled (kernels/csrc/step.cpp), keys and values
written in place. The prompt is read by the model's own forward pass. Any other model takes transformers' way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.precision import FLOAT
from polybit.hub.families import is_known
from polybit.hub.lm import longest_input
from polybit.kernels import ops, step
from polybit.kernels.cpu import TYPES
from polybit.kernels.prepared import DIGITS, Bundle
from polybit.nn.linear import QuantEmbedding, QuantWeight, TiedHead, slice_rows

Call = Callable[[], Any]


@dataclass(slots=True)
class DecodeBlock:
    """What one decoder block does, as calls from fixed memory into fixed memory; the products are put in by `bind`."""

    norm_in: Call
    attend: Any  # the compiled attention over this block's keys and values
    norm_mlp: Call
    keys: Tensor  # [kv heads, room, head size]
    values: Tensor
    products: tuple[Call, Call, Call, Call] | None = None  # q k v · o · gate up · down


class Decoder:
    """Reads one sequence of at most `room` tokens; `supported` must have said yes.

    Switching the model's precision between steps is allowed: what layers are read at is looked up in every step.
    """

    def __init__(self, model: nn.Module, room: int) -> None:
        inner: Any = model.model
        config: Any = model.config
        self.model, self.room, self.length, self.inner = model, room, 0, inner
        self.lm_head: Any = model.lm_head
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.size = int(inner.layers[0].self_attn.head_dim)
        self.library = step.library()
        assert self.library is not None
        wide, hidden, middle = self.heads * self.size, int(config.hidden_size), int(config.intermediate_size)
        cosine, sine = inner.rotary_emb(torch.zeros(1, 1, hidden), torch.arange(room)[None])
        self.cosine_TD, self.sine_TD = cosine[0].float().contiguous(), sine[0].float().contiguous()
        # The work space of one token: every block reads and writes the same memory.
        self.hidden, self.normed, self.o, self.down = (torch.zeros(1, hidden) for _ in range(4))
        self.q, self.mixed = (torch.zeros(1, wide) for _ in range(2))
        self.k, self.v = (torch.zeros(1, self.kv_heads * self.size) for _ in range(2))
        self.gate, self.up, self.gated = (torch.zeros(1, middle) for _ in range(3))
        self.logits = torch.zeros(1, int(config.vocab_size))
        self.embed = embedder(inner.embed_tokens)
        self.eps = float(config.rms_norm_eps)
        self.blocks = [self.block(layer, first=layer is inner.layers[0]) for layer in inner.layers]
        self.norm_out = self.norm(inner.norm, self.down)
        places = (self.gate, self.up, self.gated)
        self.mix = partial(self.library.gate, *(t.data_ptr() for t in places), middle)
        self.layers = [module for module in model.modules() if isinstance(module, QuantWeight)]
        self.head: Call = lambda: None
        self.bound: list[Any] | None = None

    def norm(self, norm: Any, more: Tensor | None) -> Call:
        """hidden += more, normed = its norm."""
        assert self.library is not None
        hidden, normed = self.hidden, self.normed
        added = 0 if more is None else more.data_ptr()
        places = (hidden.data_ptr(), added, norm.weight.data_ptr(), normed.data_ptr())
        return partial(self.library.norm, *places, hidden.shape[1], self.eps)

    def block(self, layer: Any, *, first: bool) -> DecodeBlock:
        """The calls and the cache of one block."""
        attention = layer.self_attn
        keys, values = (torch.empty(self.kv_heads, self.room, self.size) for _ in range(2))
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        assert self.library is not None
        compiled = self.library.Attention(
            self.heads, self.kv_heads, self.size, self.cosine_TD.shape[1], self.room, float(attention.scaling),
            int(getattr(attention, "sliding_window", getattr(self.model.config, "sliding_window", None)) or 0),
            0 if q_norm is None else q_norm.weight.data_ptr(), 0 if k_norm is None else k_norm.weight.data_ptr(),
            self.eps, keys.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        norm_in = self.norm(layer.input_layernorm, None if first else self.down)
        return DecodeBlock(norm_in, compiled, self.norm(layer.post_attention_layernorm, self.o), keys, values)

    def bind(self) -> None:
        """Make the products' calls for what the layers are read at now, unless nothing has changed."""
        now = [(m.precision, m.arithmetic, m.keep, m.offsets, getattr(m, "adapter", None)) for m in self.layers]
        if now == self.bound:
            return
        for layer, block in zip(self.inner.layers, self.blocks, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            sources = [attention.q_proj, attention.k_proj, attention.v_proj]
            block.products = (
                product(sources, self.normed, [self.q, self.k, self.v]),
                product([attention.o_proj], self.mixed, [self.o]),
                product([mlp.gate_proj, mlp.up_proj], self.normed, [self.gate, self.up]),
                product([mlp.down_proj], self.gated, [self.down]),
            )
        self.head = product([self.lm_head], self.normed, [self.logits])
        self.bound = now

    @torch.inference_mode()
    def read(self, ids_1T: Tensor) -> Tensor:
        """Read a prompt by the model's own forward pass; the logits [1, V] that follow it."""
        out = self.model(input_ids=ids_1T, use_cache=True, logits_to_keep=1)
        self.length = ids_1T.shape[1]
        for block, cached in zip(self.blocks, out.past_key_values.layers, strict=True):
            kept = cached.keys.shape[2]  # a sliding window keeps the last tokens only
            block.keys[:, self.length - kept : self.length] = cached.keys[0]
            block.values[:, self.length - kept : self.length] = cached.values[0]
        return out.logits[:, -1].float()

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Read one more token; the logits [1, V] that follow it."""
        assert self.length < self.room
        self.bind()
        place, turn = self.length, 4 * self.length * self.cosine_TD.shape[1]
        turned = (self.cosine_TD.data_ptr() + turn, self.sine_TD.data_ptr() + turn, self.mixed.data_ptr(), place)
        attended = (self.q.data_ptr(), self.k.data_ptr(), self.v.data_ptr(), *turned)
        mix = self.mix
        self.hidden.copy_(self.embed(token))
        for block in self.blocks:
            assert block.products is not None
            qkv, o, gate_up, down = block.products
            block.norm_in()
            qkv()
            block.attend.step(*attended)
            o()
            block.norm_mlp()
            gate_up()
            mix()
            down()
        self.norm_out()
        self.head()
        self.length += 1
        return self.logits.clone()


def product(modules: Sequence[nn.Module], x: Tensor, ys: Sequence[Tensor]) -> Call:
    """A call that writes x times every module into its y: straight to the compiled kernels where they can."""
    compiled = compiled_product(modules, x, ys)
    if compiled is not None:
        return compiled
    if len(modules) > 1:
        each = [product([module], x, [y]) for module, y in zip(modules, ys, strict=True)]
        return lambda: [call() for call in each]
    module, y = modules[0], ys[0]
    if type(module) is nn.Linear and module.bias is None:
        return lambda: torch.mm(x, module.weight.T, out=y)
    # a tensor of its own: layers may remember by its identity what they computed, and x is written behind torch's back
    return lambda: y.copy_(module(x.clone()))


def compiled_product(modules: Sequence[nn.Module], x: Tensor, ys: Sequence[Tensor]) -> Call | None:
    """The same as one call of the compiled kernels, or None where a layer is not read by them alone."""
    weights: list[Any] = [m.source[0] if type(m) is TiedHead else m for m in modules]
    if not all(isinstance(w, QuantWeight) and w.is_fast(x) and w.precision.a == FLOAT for w in weights):
        return None
    prepared = [weight.prepared() for weight in weights]
    biases: list[Any] = [module.bias for module in modules]
    good = all(p.layer is not None and (b is None or p.takes_bias(b)) for p, b in zip(prepared, biases, strict=True))
    modes = {weight.arithmetic for weight in weights}
    if not good or len(modes) > 1 or not Bundle.fits(prepared):
        return None
    adapters: list[Any] = [getattr(weight, "adapter", None) for weight in weights]
    factors = [None if adapter is None else adapter.for_kernels() for adapter in adapters]
    numbers = [p.number(weight.reading) for p, weight in zip(prepared, weights, strict=True)]
    places = [0 if bias is None else bias.data_ptr() for bias in biases]
    types = [0 if bias is None else TYPES[bias.dtype] for bias in biases]
    fixed = (DIGITS[modes.pop()], 1, TYPES[x.dtype], x.data_ptr())
    outs = [y.data_ptr() for y in ys]
    if len(prepared) == 1:
        return partial(prepared[0].layer.multiply, numbers[0], *fixed, outs[0], places[0], types[0], factors[0])
    return partial(Bundle(prepared).bundle.multiply, numbers, *fixed, outs, places, types, factors)


def embedder(module: nn.Module) -> Callable[[int], Tensor]:
    """The embedding of one token, float32 [1, D]; of a quantized one only its block of rows is decoded."""
    if type(module) is QuantEmbedding and not module.keep:

        def one(token: int) -> Tensor:
            part, skipped = slice_rows(module.planes, token, token + 1)
            return ops.decode(part, module.reading)[skipped : skipped + 1]

        return one
    return lambda token: module(torch.tensor([token]))


def supported(model: nn.Module) -> bool:
    """Whether `Decoder` computes what the model's own forward pass computes."""
    return step.library() is not None and is_known(model)


def generate(model: nn.Module, ids_1T: Tensor, **options: Any) -> Tensor:
    """`model.generate(ids, ...)` with the same options and tokens, by the fast path where there is one."""
    settings = options.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        return options.get(name, getattr(settings, name, None))

    plain = asked("num_beams") in (None, 1) and not asked("return_dict_in_generate")
    mask = options.get("attention_mask")
    if ids_1T.shape[0] == 1 and plain and (mask is None or bool(mask.all())) and supported(model):
        # transformers keeps the streamer from loops that are not its own
        options["custom_generate"] = partial(continue_one, streamer=options.get("streamer"))
    return model.generate(ids_1T, **options)  # type: ignore[operator]


@torch.inference_mode()
def continue_one(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **_: Any,
) -> Tensor:
    """transformers' decoding loop for one sequence, given its processors and criteria; returns prompt and answer."""
    longest = longest_input(model) or 1 << 16
    decoder = Decoder(model, int(stopping_criteria.max_length or longest))
    logits_1V = decoder.read(input_ids)
    while True:
        scores_1V = logits_processor(input_ids, logits_1V)
        if generation_config.do_sample:
            next_11 = torch.multinomial(scores_1V.softmax(-1), num_samples=1)
        else:
            next_11 = scores_1V.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, next_11], dim=-1)
        if streamer is not None:
            streamer.put(next_11[0].cpu())
        if bool(stopping_criteria(input_ids, None).all()):
            break
        logits_1V = decoder.step(int(next_11))
    if streamer is not None:
        streamer.end()
    return input_ids
