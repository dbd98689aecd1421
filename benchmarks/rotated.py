"""4-bit activations trained after a rotation: what comes back of the loss that post-training quantization made.

    python benchmarks/rotated.py --work DIR --seeds 3

The residual stream and the heads of the embedded model are turned by Hadamard matrices with random signs, folded into
the weights, so that the float model says the same (QuaRot, arXiv 2404.00456, without its rotations at run time); then
GPTQ at w4a4 per row, then distillation from the float model on all tokens, prompts included, norms trained too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from switchable import Bench, fit
from torch import Tensor
from transformers import AutoModelForCausalLM

from polybit.core.plan import Plan
from polybit.core.planes import unpack
from polybit.hub.load import load
from polybit.nn.switch import panel
from polybit.train.cascade import Cascade, answer_part
from polybit.train.latent import Freedom, make_trainable

PRESET = "w4a4"


def hadamard(size: int) -> Tensor:
    """Orthogonal Hadamard matrix of a power of two, float64."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / size**0.5


@torch.no_grad()
def rotate(model):
    """A Llama with the same logits, its residual stream and values rotated, the gains of its norms folded away."""
    config, old = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    size, head = config.hidden_size, hadamard(config.head_dim)
    signs = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.5
    turn = hadamard(size) * torch.where(signs, -1.0, 1.0).double()[:, None]
    values = torch.block_diag(*[head] * config.num_key_value_heads)
    outputs = torch.block_diag(*[head] * config.num_attention_heads)
    table, unit = old["model.embed_tokens.weight"], torch.ones(size)
    new = {"lm_head.weight": table * old["model.norm.weight"] @ turn, "model.embed_tokens.weight": table @ turn}
    new["model.norm.weight"] = unit
    for layer in (f"model.layers.{index}." for index in range(config.num_hidden_layers)):
        for norm, readers in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            gain, new[f"{layer}{norm}.weight"] = old[f"{layer}{norm}.weight"], unit
            for reader in readers:
                name = f"{layer}{'self_attn' if len(reader) == 1 else 'mlp'}.{reader}_proj.weight"
                new[name] = old[name] * gain @ turn
        name = layer + "self_attn.v_proj.weight"
        new[name] = values.T @ new[name]
        new[layer + "self_attn.o_proj.weight"] = turn.T @ old[layer + "self_attn.o_proj.weight"] @ outputs
        new[layer + "mlp.down_proj.weight"] = turn.T @ old[layer + "mlp.down_proj.weight"]
    untied = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    rotated = AutoModelForCausalLM.from_config(untied, dtype=torch.float32).eval()
    rotated.load_state_dict({name: tensor.float() for name, tensor in new.items()})
    return rotated


def every_token(batch):
    """The part of a batch that predicts any token, not only the answer's."""
    return answer_part({**batch, "learn_BT": batch["mask_BT"].bool()})


def main() -> None:
    """Rotate, quantize, train, measure; a JSON line for the start and for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=5e-4)
    knobs = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(knobs.work, items=100)
    source, start = knobs.work / "rotated", knobs.work / "rotated start"
    if not source.is_dir():
        rotate(bench.teacher).save_pretrained(source)
        bench.tokenizer.save_pretrained(source)
    if not start.is_dir():
        flags = ["--bits", "4", "--method", "gptq", "--group-size", "0", "--calibration", "embedded", "--samples", "64"]
        command = [
            sys.executable,
            "-m",
            "polybit",
            "quantize",
            str(source),
            *flags,
            "--no-measure",
            "--out",
            str(start),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    codes = {name: unpack(layer.planes) for name, layer in panel(load(start)[0]).layers.items()}
    for seed in range(knobs.seeds):
        plans, freedom = {PRESET: Plan.uniform(PRESET)}, Freedom(others="norms", margin=0.5)
        model = make_trainable(load(source)[0], plans, start=codes, freedom=freedom)
        if seed == 0:
            print(json.dumps(bench.measure(model, (PRESET, "float"))), flush=True)
        objective = Cascade("independent", data=0.0, source=bench.teacher, pose=every_token)
        further = {"rate": knobs.rate, "batch": 8}
        spent = fit(bench, model, objective, (PRESET,), seed=seed, steps=knobs.steps, further=further)
        print(json.dumps({"seed": seed, "cpu": spent, "end": bench.measure(model, (PRESET,))}), flush=True)


if __name__ == "__main__":
    main()
