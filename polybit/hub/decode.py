"""Write text token by token without transformers' work between the products: the fast path of one sequence on a CPU.

A Llama-like decoder (Llama, Mistral, Qwen2, Qwen3) reads one token as a dozen calls per block: the products through the
model's own layers at their present precision, everything between them compiled (kernels/csrc/step.cpp), keys and values
written in place. The prompt is read by the model's own forward pass. Any other model takes transformers' way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense

from polybit.core.planes import ROWS
from polybit.kernels import ops, step
from polybit.nn.linear import QuantEmbedding, QuantLinear, QuantWeight, TiedHead, slice_rows

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STEADY_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text


@dataclass(slots=True)
class Block:
    """What one decoder block is made of, as the step calls it."""

    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    o: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    attend: Any  # the compiled attention over this block's keys and values
    norm_in: int  # addresses of the weights of both norms
    norm_mlp: int
    keys: Tensor  # [kv heads, room, head size]
    values: Tensor


class Decoder:
    """Reads one sequence of at most `room` tokens; `supported` must have said yes.

    Switching the model's precision between steps is allowed: layers are read as they are at the moment of the call.
    """

    def __init__(self, model: nn.Module, room: int) -> None:
        inner: Any = model.model
        config: Any = model.config
        self.model, self.room, self.length = model, room, 0
        self.hidden = int(config.hidden_size)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.size = int(inner.layers[0].self_attn.head_dim)
        self.library = step.library()
        assert self.library is not None
        probe = torch.zeros(1, 1, self.hidden)
        cosine, sine = inner.rotary_emb(probe, torch.arange(room)[None])
        self.cosine_TD, self.sine_TD = cosine[0].float().contiguous(), sine[0].float().contiguous()
        self.embed = embedder(inner.embed_tokens)
        self.head = caller(model.lm_head)  # type: ignore[arg-type]
        self.eps = float(config.rms_norm_eps)
        self.blocks = [self.block(layer) for layer in inner.layers]
        self.norm_out = inner.norm.weight.data_ptr()
        # Work space of one token; the products return their own.
        self.normed = torch.empty(1, self.hidden)
        self.mixed = torch.empty(1, self.heads * self.size)
        self.gated = torch.empty(1, int(config.intermediate_size))

    def block(self, layer: Any) -> Block:
        """The callables and the cache of one block."""
        attention, mlp = layer.self_attn, layer.mlp
        keys, values = (torch.zeros(self.kv_heads, self.room, self.size) for _ in range(2))
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        assert self.library is not None
        compiled = self.library.Attention(
            self.heads, self.kv_heads, self.size, self.cosine_TD.shape[1], self.room, float(attention.scaling),
            int(getattr(attention, "sliding_window", getattr(self.model.config, "sliding_window", None)) or 0),
            0 if q_norm is None else q_norm.weight.data_ptr(), 0 if k_norm is None else k_norm.weight.data_ptr(),
            self.eps, keys.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        mixing = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        q, k, v, o, gate, up, down = map(caller, (*mixing, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        norms = (layer.input_layernorm.weight.data_ptr(), layer.post_attention_layernorm.weight.data_ptr())
        return Block(q, k, v, o, gate, up, down, compiled, *norms, keys, values)

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
        assert self.library is not None and self.length < self.room
        norm, gate, eps, width, place = self.library.norm, self.library.gate, self.eps, self.hidden, self.length
        normed, mixed, gated = self.normed, self.mixed, self.gated
        at_normed, at_mixed, at_gated, inner = normed.data_ptr(), mixed.data_ptr(), gated.data_ptr(), gated.shape[1]
        turn = 4 * place * self.cosine_TD.shape[1]
        cosine, sine = self.cosine_TD.data_ptr() + turn, self.sine_TD.data_ptr() + turn
        hidden = self.embed(token)
        at_hidden, more = hidden.data_ptr(), 0
        for block in self.blocks:
            norm(at_hidden, more, block.norm_in, at_normed, width, eps)
            q, k, v = block.q(normed), block.k(normed), block.v(normed)
            block.attend.step(q.data_ptr(), k.data_ptr(), v.data_ptr(), cosine, sine, at_mixed, place)
            o = block.o(mixed)
            norm(at_hidden, o.data_ptr(), block.norm_mlp, at_normed, width, eps)
            g, u = block.gate(normed), block.up(normed)
            gate(g.data_ptr(), u.data_ptr(), at_gated, inner)
            down = block.down(gated)
            more = down.data_ptr()
        norm(at_hidden, more, self.norm_out, at_normed, width, eps)
        self.length += 1
        return self.head(normed)


def caller(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer as a function of its input, past nn.Module's own call, which costs as much as a small product."""
    if type(module) is QuantLinear:
        return lambda x: module.multiply(x, module.bias)
    if type(module) is TiedHead:
        return lambda x: module.source[0].multiply(x, module.bias)
    if type(module) is nn.Linear:
        return lambda x: dense(x, module.weight, module.bias)
    return module


def embedder(module: nn.Module) -> Callable[[int], Tensor]:
    """The embedding of one token as a fresh float32 [1, D]; of a quantized one only its block of rows is decoded."""
    if type(module) is QuantEmbedding and not module.keep:

        def one(token: int) -> Tensor:
            part, skipped = slice_rows(module.planes, token, token + 1)
            assert skipped < ROWS
            return ops.decode(part, module.width)[skipped : skipped + 1].clone()

        return one
    return lambda token: module(torch.tensor([token])).float().clone()


def supported(model: nn.Module) -> bool:
    """Whether `Decoder` computes what the model's own forward pass computes: family, types, places, no hooks."""
    config: Any = getattr(model, "config", None)
    if step.library() is None or getattr(config, "model_type", None) not in FAMILIES:
        return False
    rotation = getattr(config, "rope_parameters", None) or {}
    if rotation.get("rope_type", "default") not in STEADY_ROTATIONS or getattr(config, "hidden_act", "") != "silu":
        return False
    inner = getattr(model, "model", None)
    if inner is None or not len(getattr(inner, "layers", ())) or not hasattr(inner, "rotary_emb"):
        return False
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
    stored = {id(p) for module in model.modules() if isinstance(module, QuantWeight) for p in module.parameters()}
    floats = [p for p in model.parameters() if id(p) not in stored]
    return all(p.is_cpu for p in model.parameters()) and all(p.dtype == torch.float32 for p in floats)


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
    decoder = Decoder(model, int(stopping_criteria.max_length))
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
