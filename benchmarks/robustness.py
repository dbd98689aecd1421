"""Robustness on the embedded model: weights against activations, and adversarial training at a drawn precision (RPT).

    python benchmarks/robustness.py grid CHECKPOINT [--items 100] [--seeds 0,1,2] [--json FILE]
    python benchmarks/robustness.py pgd CHECKPOINT [--items 64] [--seeds 0,1,2] [--epsilons E,E] [--json FILE]
    python benchmarks/robustness.py rpt [--seeds 0,1,2] [--steps 40] [--json FILE]

grid: exact match on the reading task, answers frozen before a reference is read, and perplexity, for every pair of
weight and activation widths of a nested checkpoint. pgd: the transfer matrix in embedding space. rpt: the model
trained on the reading task for a few steps - not at all, against attacks at a fixed width, against attacks at a width
drawn per step - and then attacked by token swaps at every width and at all of them; equal updates, data and attack
strength. The transfer matrix of token swaps is `polybit attack CHECKPOINT --seeds 0,1,2`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polybit.commands.attack import AttackConfig, one_seed, summarize
from polybit.commands.models import open_model
from polybit.core.plan import Plan
from polybit.data import synth
from polybit.data.batches import pad
from polybit.data.chat import encode_conversation
from polybit.data.squad import write_squad
from polybit.data.text import read_windows
from polybit.evals import squad
from polybit.evals.perplexity import token_nll
from polybit.evals.scoring import bootstrap
from polybit.hub.lm import LocalLM
from polybit.report.robustness import terminal_table
from polybit.robust.cases import build_cases
from polybit.robust.embeddings import Adversarial
from polybit.robust.transfer import ADAPTIVE, Game, embedding_game
from polybit.train.cascade import Cascade
from polybit.train.forward import logits_of
from polybit.train.latent import freeze, make_trainable, use
from polybit.train.schedules import Drawn, Fixed

WEIGHTS, ACTIVATIONS = (8, 6, 4, 3, 2), (8, 6, 4)
PRESETS = ("w8", "w4", "w3")
GRID_SEED, PGD_SEED = 41_000, 42_000  # of the questions; no other part of the project asks these


def grid(options: argparse.Namespace) -> dict[str, Any]:
    """EM and perplexity of every width of weights with every width of activations."""
    lm = LocalLM(*open_model(options.checkpoint))
    windows, _ = read_windows("embedded-test", lm.tokenizer, 256, count=16)
    rows: dict[str, Any] = {}
    print("| weights | activations | EM (95 % interval) | by seed | perplexity |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = [
            write_squad(Path(folder) / f"{s}.json", synth.items("reading", options.items, GRID_SEED + s))
            for s in options.seeds
        ]
        for weight in WEIGHTS:
            for activation in (16, *ACTIVATIONS):
                name = f"w{weight}" if activation == 16 else f"w{weight}a{activation}"
                with lm.at(name):
                    answer = squad.generative(lm)
                    right = [squad.run(answer, f.questions(), f, Path(folder) / "said.json")["em"] for f in files]
                    nll = token_nll(lm, windows)
                em = bootstrap(np.concatenate(right))
                by_seed = [float(r.mean()) for r in right]
                rows[name] = {"em": em.to_json(), "by_seed": by_seed, "perplexity": float(np.exp(nll.mean()))}
                print(
                    f"| {weight} | {'float' if activation == 16 else activation} | {100 * em.value:.1f} "
                    f"({100 * em.low:.1f}-{100 * em.high:.1f}) | {', '.join(f'{100 * s:.0f}' for s in by_seed)} | "
                    f"{np.exp(nll.mean()):.3f} |",
                    flush=True,
                )
    return rows


def pgd(options: argparse.Namespace) -> dict[str, Any]:
    """The transfer matrix in embedding space, at several radii."""
    lm = LocalLM(*open_model(options.checkpoint))
    presets = ("w8", "w6", "w4", "w3", "w2")
    rows: dict[str, Any] = {}
    for epsilon in (float(part) for part in options.epsilons.split(",")):
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in options.seeds:
                file = write_squad(Path(folder) / "r.json", synth.items("reading", options.items, PGD_SEED + seed))
                cases = build_cases(lm.tokenizer, file.questions(), file.answers(), place="swap")
                found.append(embedding_game(lm, cases, presets, epsilon=epsilon, seed=seed))
        both = Game(found[0].attackers, presets, np.concatenate([g.right_ADN for g in found], axis=2))
        rows[str(epsilon)] = summarize(both, AttackConfig())
        rows[str(epsilon)]["by_seed"] = [
            float(game.cell(p, p).mean()) for game in found for p in presets
        ]  # seed by seed, the diagonal
        print(f"epsilon {epsilon}\n{terminal_table(rows[str(epsilon)])}", flush=True)
        print({k: rows[str(epsilon)][k] for k in ("transfer", "random_precision", "verdict")}, flush=True)
    return rows


def batches(tokenizer: Any, *, steps: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Reading questions of the training split with their answers, as the objectives take them."""
    items = synth.items("reading", steps * size, seed, split="train")
    rows = [
        encode_conversation(tokenizer, [*item.messages, {"role": "assistant", "content": item.answer}])
        for item in items
    ]
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids, mask = pad([ids for ids, _ in part], 0)
        learn, _ = pad([[int(mine) for mine in ours] for _, ours in part], 0)
        found.append({"ids_BT": ids, "mask_BT": mask, "learn_BT": learn.bool()})
    return found


def trained(arm: str, seed: int, options: argparse.Namespace) -> LocalLM:
    """The embedded model after one way of training."""
    torch.manual_seed(seed)
    model, tokenizer = open_model("tinychat")
    make_trainable(model, {name: Plan.uniform(name) for name in PRESETS})
    if arm != "none":

        def forward(part: Any, preset: str) -> torch.Tensor:
            return logits_of(use(model, preset), part)

        objective = Adversarial(
            Cascade("joint", teacher=False), model, epsilon=options.epsilon, iterations=2, seed=seed
        )
        schedule: Any = Drawn(seed) if arm == "rpt" else Fixed("w8")
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=options.rate, weight_decay=0
        )
        for step, batch in enumerate(batches(tokenizer, steps=options.steps, size=12, seed=seed)):
            loss, _ = objective(forward, batch, schedule(step, PRESETS))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return LocalLM(freeze(model), tokenizer)


def rpt(options: argparse.Namespace) -> dict[str, Any]:
    """Every arm under every attacker, pooled over seeds."""
    config = AttackConfig(items=options.items, steps=5, tries=6)
    games: dict[str, Game] = {}
    for arm in ("none", "adversarial at w8", "rpt"):
        found = []
        for seed in options.seeds:
            lm = trained(arm, seed, options)
            with tempfile.TemporaryDirectory() as folder:
                seeded = AttackConfig(items=config.items, steps=config.steps, tries=config.tries, seeds=str(seed))
                found.append(one_seed(lm, PRESETS, seeded, Path(folder)))
            print(
                arm,
                seed,
                {a: found[-1].against([a]).mean(2)[0].round(2).tolist() for a in found[-1].attackers},
                flush=True,
            )
        games[arm] = Game(found[0].attackers, found[0].defenders, np.concatenate([g.right_ADN for g in found], axis=2))
    everyone = [*PRESETS, ADAPTIVE]
    rows: dict[str, Any] = {}
    strongest = games["adversarial at w8"]
    base = strongest.fixed(strongest.best_fixed(everyone), everyone)
    for arm, game in games.items():
        rows[arm] = summarize(game, config)
        drawn = game.drawn(everyone)
        rows[arm]["drawn_against_best_fixed_adversarial"] = bootstrap(drawn, paired_with=base).to_json()
        rows[arm]["by_seed"] = [float(part.mean()) for part in np.split(drawn, len(options.seeds))]
        print(arm, rows[arm]["random_precision"], rows[arm]["drawn_against_best_fixed_adversarial"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "pgd", "rpt"))
    parser.add_argument("checkpoint", nargs="?", default="")
    parser.add_argument("--items", type=int, default=0)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--epsilons", default="0.01,0.02,0.05")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.items = options.items or {"grid": 100, "pgd": 64, "rpt": 24}[options.what]
    rows = {"grid": grid, "pgd": pgd, "rpt": rpt}[options.what](options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
