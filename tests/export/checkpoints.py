"""Small checkpoints to export, with the embedded model's tokenizer: a nested one, and fixed ones of any width."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from polybit.core.affine import Grid
from polybit.core.planes import pack, storable_ratio
from polybit.hub.checkpoint import save
from polybit.hub.tiny import path
from polybit.nn.convert import convert, targets
from polybit.quant.rtn import rtn


def float_llama(**changes):
    """A random Llama whose head is tied to its embedding, unless `changes` say otherwise."""
    torch.manual_seed(0)
    base = json.loads((path() / "config.json").read_text())
    sizes = {
        "vocab_size": base["vocab_size"],
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def checkpoint(out, *, bits=8, zero="group", group_size=32, nested=True, ends=False, widths=None, model=None):
    """Save a checkpoint of a random Llama there; nested codes get ratios, and their leading bits are read."""
    model = float_llama() if model is None else model
    planes = {}
    for target in targets(model, include_embeddings=ends):
        q = rtn(target.weight_OI(model), None, Grid((widths or {}).get(target.name, bits), group_size, zero))
        if nested:
            drawn = torch.rand(q.scale_OG.shape, generator=torch.Generator().manual_seed(3))
            ratios = {b: storable_ratio(1 + 0.1 * drawn) for b in (2, 4, 6)}
            q = replace(q, ratios=ratios | {3: torch.tensor(1.03125)})
        planes[target.name] = pack(q)
    save(
        convert(model, planes),
        out,
        tokenizer=AutoTokenizer.from_pretrained(path()),
        widths=(8, 6, 5, 4, 3, 2) if nested else (bits,),
        notes={"base_model": "tinychat"},
    )
    return out
