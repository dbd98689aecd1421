"""What one step of distillation costs: rows read in pieces, what they share once, against one padded rectangle.

    python benchmarks/training_step.py MODEL PAIRS [--bits 3] [--batch 16] [--rounds 3]

PAIRS: a directory of `polybit pairs MODEL --out PAIRS`. Prints CPU seconds of forward and backward, and how far loss
and gradients lie apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import process_time

import torch

from polybit.core.plan import Plan
from polybit.hub.load import load_float
from polybit.hub.workspace import model_digest
from polybit.nn.switch import use
from polybit.train import forward
from polybit.train.distill import Distillation
from polybit.train.latent import Freedom, latent_layers, make_trainable
from polybit.train.material import read_material

WAYS = {"one rectangle": 10**9, "in pieces": forward.PASS["cpu"]}


def main() -> None:
    """Time both ways on the same rows, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    for name, value in (("bits", 3), ("batch", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    model, tokenizer = load_float(args.model)
    material = read_material(args.pairs, reference=model_digest(model), pad_token=tokenizer.pad_token_id or 0)
    preset = f"w{args.bits}"
    make_trainable(model, {preset: Plan.uniform(args.bits)}, freedom=Freedom(scales="recomputed", margin=0.05))
    use(model, preset)
    spent, apart = dict.fromkeys(WAYS, 0.0), 0.0
    for turn in range(args.rounds):
        rows = range(turn * args.batch, (turn + 1) * args.batch)
        part = material.part(rows, [material.chosen[row] for row in rows], [0] * args.batch)
        found = {}
        for layer in latent_layers(model).values():
            layer.weight()  # both ways find the codes made
        for way, price in WAYS.items():
            forward.PASS["cpu"] = price
            began = process_time()
            loss, _ = Distillation()(lambda p, _: forward.logits_of(model, p), {"chosen": part}, (preset,))
            loss.backward()
            spent[way] += process_time() - began
            found[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
        whole, pieces = found.values()
        apart = max(apart, float((whole - pieces).norm() / whole.norm()))
        print(
            f"rows {rows.start} to {rows.stop - 1}: {forward.layout(forward.ends(part), forward.beginning(part), 64)}"
        )
    for way, seconds in spent.items():
        print(f"{way}: {seconds / args.rounds:.2f} CPU s a step")
    print(f"gradients differ by {apart:.1e} of their length")


if __name__ == "__main__":
    main()
