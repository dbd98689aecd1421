"""4-bit activations mended: how much of the loss GPTQ made at w4a4 is taken back, with and without a rotation.

    python benchmarks/rotated.py --work DIR --seeds 0 1 2 [--arms rotated plain] [--steps 80] [--rate 5e-4] [--batch 8]

plain: GPTQ at w4a4 per row, then distillation from the float model, norms trained too · rotated: the same after the
residual stream and the heads of the model are turned by Hadamard matrices with random signs, folded into the weights,
so that the float model says the same (QuaRot, arXiv 2404.00456, without its rotations at run time). --pose all
distills on all tokens, prompts included; answer on those of the replies. Rows go to DIR/rows.jsonl; tables of them:
benchmarks/switch_tables.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench_rows import Rows, device_of
from switch_bench import Bench, fit
from torch import Tensor
from transformers import AutoModelForCausalLM

from polybit.core.plan import Plan
from polybit.train.cascade import Cascade, answer_part
from polybit.train.latent import Freedom, make_trainable

PRESET = "w4a4"
START = "--bits 4 --method gptq --group-size 0 --calibration embedded"


def hadamard(size: int) -> Tensor:
    """Orthogonal Hadamard matrix of a power of two, float64."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / size**0.5


@torch.no_grad()
def rotate(model):
    """A Llama with the same logits, its residual stream and values rotated, the gains of its norms folded away."""
    config, old = model.config, {name: tensor.double().cpu() for name, tensor in model.state_dict().items()}
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


def corrupted(share: float, vocabulary: int, seed: int):
    """As `every_token`, with that share of the tokens replaced by random ones before anybody reads them: the float
    model answers the same corrupted text, so that the student follows it off the training text's names too."""
    generator: dict[str, torch.Generator] = {}

    def pose(batch):
        ids_BT = batch["ids_BT"]
        if "drawn" not in generator:
            generator["drawn"] = torch.Generator(ids_BT.device).manual_seed(seed)
        drawn = {"generator": generator["drawn"], "device": ids_BT.device}
        chosen_BT = torch.rand(ids_BT.shape, **drawn) < share
        other_BT = torch.randint(vocabulary, ids_BT.shape, **drawn)
        return every_token({**batch, "ids_BT": torch.where(chosen_BT, other_BT, ids_BT)})

    return pose


def source_of(bench: Bench) -> str:
    """The rotated model on disk, for `polybit quantize`; only where its codes are not kept already."""
    path = bench.data / "rotated"
    if not path.is_dir() and not any(bench.data.glob("rotated-start-*")):
        rotate(bench.teacher).save_pretrained(path)
        bench.tokenizer.save_pretrained(path)
    return str(path)


def one(bench: Bench, rows: Rows, knobs: argparse.Namespace, arm: str, seed: int) -> None:
    """Start, train, measure."""
    given: dict[str, Any] = {"steps": knobs.steps, "batch": knobs.batch, "rate": knobs.rate, "items": knobs.items}
    given |= {name: getattr(knobs, name) for name in ("pose", "corrupt", "others", "rows", "held_out", "margin")}
    key = {"part": "rotated", "model": bench.name, "preset": PRESET, "arm": arm, "seed": seed, **given}
    if rows.has(key):
        return
    turned = arm == "rotated"
    model = rotate(bench.load()[0]) if turned else bench.load()[0]
    start = bench.start(START, source_of(bench) if turned else None)
    freedom = Freedom(others=True if knobs.others == "all" else "norms", margin=knobs.margin)
    make_trainable(model, {PRESET: Plan.uniform(PRESET)}, start=start, freedom=freedom).to(bench.device)
    before = bench.measure(model, (PRESET, "float"))
    pose: Any = every_token if knobs.pose == "all" else None
    if knobs.corrupt:
        pose = corrupted(knobs.corrupt, bench.teacher.config.vocab_size, seed)
    objective = Cascade("independent", data=0.0, source=bench.teacher, pose=pose)
    how = {"rate": knobs.rate, "batch": knobs.batch, "steps": knobs.steps, "seed": seed}
    lessons = bench.lessons(0, knobs.rows) if knobs.rows else None
    spent = fit(bench, model, objective, (PRESET,), lessons=lessons, **how)
    end = bench.measure(model, (PRESET,))
    for measured in (*before.values(), *end.values()):
        measured.pop("rows")
    rows.write(key, {**spent, "start": before, "end": end})


def main() -> None:
    """Every arm and seed that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="where prepared material is found and kept (default: --work)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=["rotated", "plain"], default=["rotated", "plain"])
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--held-out", choices=["test", "validation"], default="test")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--pose", choices=["all", "answer"], default="all")
    parser.add_argument("--corrupt", type=float, default=0.0, help="share of tokens replaced by random ones")
    parser.add_argument("--others", choices=["norms", "all"], default="norms", help="what is trained beside the codes")
    parser.add_argument("--rows", type=int, default=0, help="so many training rows, the same for all seeds")
    parser.add_argument("--margin", type=float, default=0.5)
    knobs = parser.parse_args()
    device = device_of(knobs.device)
    bench = Bench(knobs.data or knobs.work, items=knobs.items, part=knobs.held_out, device=device)
    rows = Rows(knobs.work / "rows.jsonl")
    for seed in knobs.seeds:
        for arm in knobs.arms:
            one(bench, rows, knobs, arm, seed)


if __name__ == "__main__":
    main()
