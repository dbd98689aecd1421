"""4-bit activations mended: how much of the loss GPTQ made at w4a4 is taken back, with and without a rotation.

    python benchmarks/rotated.py --work DIR --seeds 0 1 2 [--arms rotated plain] [--steps 80] [--rate 5e-4] [--batch 8]

plain: GPTQ at w4a4 per row, then distillation from the float model, norms trained too · rotated: the same behind
`polybit quantize --rotate`, which turns the residual stream and the heads (polybit/nn/rotation.py). --pose all
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

from polybit.core.plan import Plan
from polybit.nn.rotation import Rotation, rotate
from polybit.train.cascade import Cascade, answer_part
from polybit.train.latent import Freedom, make_trainable

PRESET = "w4a4"
START = "--bits 4 --method gptq --group-size 0 --calibration embedded"


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


def one(bench: Bench, rows: Rows, knobs: argparse.Namespace, arm: str, seed: int) -> None:
    """Start, train, measure."""
    given: dict[str, Any] = {"steps": knobs.steps, "batch": knobs.batch, "rate": knobs.rate, "items": knobs.items}
    given |= {name: getattr(knobs, name) for name in ("pose", "corrupt", "others", "rows", "held_out", "margin")}
    key = {"part": "rotated", "model": bench.name, "preset": PRESET, "arm": arm, "seed": seed, **given}
    if rows.has(key):
        return
    turned = arm == "rotated"
    model, _ = bench.load()
    if turned:
        rotate(model, Rotation(seed=0))
    start = bench.start(f"{START} --rotate" if turned else START)
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
