"""The network as it is trained: a Llama in few lines, with its conversion to the Hugging Face layout and back.

The arithmetic is that of `LlamaForCausalLM` (rotate-half positions, pre-norm, gated MLP, tied embedding), so the
conversion only splits the matrices that are held together here for speed: query, key and value; gate and up.
Shape letters: B batch, T tokens, D model width, F feed-forward width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Size of the network."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 384
    max_tokens: int = 1024
    theta: float = 10_000.0
    epsilon: float = 1e-5


class Norm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return F.rms_norm(hidden_BTD, (hidden_BTD.shape[-1],), self.weight, self.epsilon)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.width, shape.feed_forward
        self.heads = shape.heads
        self.norm_attention = Norm(width, shape.epsilon)
        self.norm_mlp = Norm(width, shape.epsilon)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        batch, tokens, width = hidden_BTD.shape
        qkv = self.qkv(self.norm_attention(hidden_BTD)).view(batch, tokens, 3 * self.heads, width // self.heads)
        qk_BTHK, v_BTHK = qkv.split((2 * self.heads, self.heads), dim=2)
        qk_BHTK = rotate(qk_BTHK.transpose(1, 2), cos_TK, sin_TK)
        q_BHTK, k_BHTK = qk_BHTK.chunk(2, dim=1)
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BTHK.transpose(1, 2), is_causal=True)
        hidden_BTD = hidden_BTD + self.o(mixed_BHTK.transpose(1, 2).reshape(batch, tokens, width))
        gate_BTF, up_BTF = self.gate_up(self.norm_mlp(hidden_BTD)).chunk(2, dim=-1)
        return hidden_BTD + self.down(F.silu(gate_BTF) * up_BTF)


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary positions, halves paired as Hugging Face does."""
    low, high = x_BHTK.chunk(2, dim=-1)
    return torch.cat((low * cos_TK - high * sin_TK, high * cos_TK + low * sin_TK), dim=-1)


class Network(nn.Module):
    """Decoder with tied embedding; `forward` gives logits, `hidden` what goes into the last matrix."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width, shape.epsilon)
        head_width = shape.width // shape.heads
        frequency = shape.theta ** (-torch.arange(0, head_width, 2).float() / head_width)
        angle = torch.outer(torch.arange(shape.max_tokens).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02, generator=generator)
        spread = self.shape.width**-0.5
        for block in self.blocks:
            nn.init.normal_(block.qkv.weight, std=spread, generator=generator)
            nn.init.normal_(block.gate_up.weight, std=spread, generator=generator)
            nn.init.normal_(block.o.weight, std=spread / 2, generator=generator)
            nn.init.normal_(block.down.weight, std=spread / 2, generator=generator)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.embedding(ids_BT)
        cos_TK, sin_TK = self.cos[: ids_BT.shape[1]], self.sin[: ids_BT.shape[1]]
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, cos_TK, sin_TK)
        return self.norm(hidden_BTD)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.hidden(ids_BT) @ self.embedding.weight.T


def to_hugging_face(network: Network) -> dict[str, Tensor]:
    """Weights under the names of `LlamaForCausalLM`, tied output matrix left out."""
    state = {"model.embed_tokens.weight": network.embedding.weight, "model.norm.weight": network.norm.weight}
    for index, block in enumerate(network.blocks):
        prefix = f"model.layers.{index}."
        state[prefix + "input_layernorm.weight"] = block.norm_attention.weight
        state[prefix + "post_attention_layernorm.weight"] = block.norm_mlp.weight
        for letter, weight_OI in zip("qkv", block.qkv.weight.chunk(3), strict=True):
            state[f"{prefix}self_attn.{letter}_proj.weight"] = weight_OI
        state[prefix + "self_attn.o_proj.weight"] = block.o.weight
        for name, weight_OI in zip(("gate", "up"), block.gate_up.weight.chunk(2), strict=True):
            state[f"{prefix}mlp.{name}_proj.weight"] = weight_OI
        state[prefix + "mlp.down_proj.weight"] = block.down.weight
    return {name: weight.detach().clone().contiguous() for name, weight in state.items()}


def from_hugging_face(state: dict[str, Tensor], shape: Shape) -> Network:
    """The network that has the weights of a Hugging Face state dict."""
    network = Network(shape)
    own = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    for index in range(shape.layers):
        theirs, ours = f"model.layers.{index}.", f"blocks.{index}."
        own[ours + "norm_attention.weight"] = state[theirs + "input_layernorm.weight"]
        own[ours + "norm_mlp.weight"] = state[theirs + "post_attention_layernorm.weight"]
        own[ours + "qkv.weight"] = torch.cat([state[f"{theirs}self_attn.{letter}_proj.weight"] for letter in "qkv"])
        own[ours + "o.weight"] = state[theirs + "self_attn.o_proj.weight"]
        own[ours + "gate_up.weight"] = torch.cat([state[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        own[ours + "down.weight"] = state[theirs + "mlp.down_proj.weight"]
    network.load_state_dict(own)
    return network


def hugging_face_config(shape: Shape, *, bos: int, eos: int, pad: int) -> dict:
    """Contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.width // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_tokens,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "float32",
        "use_cache": True,
    }


def shape_record(shape: Shape) -> dict:
    """The shape as plain data, for the training log."""
    return asdict(shape)
