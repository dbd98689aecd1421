"""Attacks on one model at many widths: who is fooled by whom, and does drawing a width help.

    python benchmarks/robustness.py swaps|pgd|rpt --work DIR [--model tinychat] [--seeds 0 1 2] [--items N] ...
    python benchmarks/robustness.py grid CHECKPOINT [--items 100] [--seeds 0 1 2]
    python benchmarks/robustness.py tables --work DIR

swaps: six tokens put into the prompt by gradient search at each width, answered at every width. pgd: the same in
embedding space. rpt: the model trained for a few steps - not at all, against attacks at a fixed width, against attacks
at a width drawn per step - then attacked by token swaps at every width and at all of them; equal updates, data and
attack strength. grid: exact match on the reading task, and perplexity, for every pair of weight and activation widths
of a checkpoint. One JSON line per seed (and arm) in DIR/rows.jsonl, which several processes may share.

The embedded model answers the reading task: an answer is right or wrong. Another model (--model PATH --chats FILE)
replies to the first turns of held-out conversations; its score is the probability per token (geometric mean) of the
human reply, 0 to 1. The model attacked is the nested file of `polybit quantize MODEL`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_rows import Rows, cell, device_of, read_rows
from switch_bench import Bench, read_chats

from polybit.acts.attack import one_seed
from polybit.core.plan import Plan
from polybit.core.planes import pack
from polybit.data import synth
from polybit.data.batches import pad
from polybit.data.chat import encode_conversation
from polybit.data.lessons import batch as as_batch
from polybit.data.squad import write_squad
from polybit.data.text import read_windows
from polybit.evals import squad
from polybit.evals.perplexity import token_nll
from polybit.evals.scoring import bootstrap
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model
from polybit.nn.convert import convert
from polybit.nn.switch import use
from polybit.options.attack import AttackOptions
from polybit.robust.attackers import ADAPTIVE, NOBODY, NOISE, views
from polybit.robust.cases import Case, allowed_tokens, answer_tokens, build_cases, prompt_tokens
from polybit.robust.embeddings import Adversarial
from polybit.robust.gradients import Victim
from polybit.robust.table import ATTACKS
from polybit.robust.transfer import TransferGame, embedding_game
from polybit.train.cascade import Cascade
from polybit.train.forward import logits_of
from polybit.train.latent import freeze, make_trainable
from polybit.train.schedules import Drawn, Fixed

WEIGHTS, ACTIVATIONS = (8, 6, 4, 3, 2), (8, 6, 4)
NESTED = "--widths 8,6,5,4,3,2"
TRAINED = ("w8", "w4", "w3")
ARMS = ("none", "adversarial at w8", "rpt")
GRID_SEED, PGD_SEED, CHAT_SEED = 41_000, 42_000, 43_000  # of the questions; no other part of the project asks these


def view(bench: Bench, model) -> LocalLM:
    """The model as attackers see it; a GPU takes larger batches."""
    sizes = {} if bench.device.type == "cpu" else {"batch_tokens": 1 << 18, "batch_logits": 1 << 30}
    return LocalLM(model.to(bench.device), bench.tokenizer, **sizes)  # type: ignore[arg-type]


def nested(bench: Bench) -> LocalLM:
    """The model behind its nested codes, as a checkpoint of them reads."""
    model, _ = bench.load()
    return view(bench, convert(model, {name: pack(q) for name, q in bench.start(NESTED).items()}))


def chat_cases(bench: Bench, items: int, seed: int, *, tokens: int = 6) -> list[Case]:
    """First turns of held-out conversations with `tokens` random tokens behind the user's words, and the reply."""
    assert bench.chats is not None
    held_out = {tuple(row.ids) for row in bench.held_out.rows}
    talks = [t for t in read_chats(bench.chats) if tuple(encode_conversation(bench.tokenizer, t)[0]) in held_out]
    generator = torch.Generator().manual_seed(CHAT_SEED + seed)
    chosen = torch.randperm(len(talks), generator=generator)[:items].tolist()
    vocabulary = torch.tensor(allowed_tokens(bench.tokenizer))
    found = []
    for number in chosen:
        asked, said = talks[number][:2]
        ids, spans = prompt_tokens(bench.tokenizer, [asked])
        text = bench.tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        stop = text.find(asked["content"]) + len(asked["content"])
        after = sum(1 for span in spans if span[0] < stop)
        answer = answer_tokens(bench.tokenizer, [asked], ids, said["content"])
        drawn = vocabulary[torch.randint(len(vocabulary), (tokens,), generator=generator)].tolist()
        free = tuple(range(after, after + tokens))
        found.append(Case(f"chat {number}", (*ids[:after], *drawn, *ids[after:]), free, tuple(answer)))
    return found


def without_free(case: Case) -> Case:
    """The case before anybody put tokens into it."""
    return Case(case.id, tuple(t for n, t in enumerate(case.ids) if n not in case.free), (), case.answer)


def chat_game(bench: Bench, lm: LocalLM, presets, config: AttackOptions, seed: int) -> TransferGame:
    """The game of conversations: the score is the probability per token of the reply."""
    cases = chat_cases(bench, config.items, seed, tokens=config.tokens)
    allowed = allowed_tokens(bench.tokenizer)
    prompts = {NOBODY: [without_free(case) for case in cases], NOISE: cases}
    budget = replace(config.budget(), changes=0)  # all tokens of the suffix are the attacker's
    for name, looked_at in views(presets).items():
        prompts[name] = ATTACKS[config.method](Victim(lm, looked_at), cases, budget, allowed, seed=seed)
    right = [[(-Victim(lm, [p]).losses(found)).exp().numpy() for p in presets] for found in prompts.values()]
    return TransferGame(tuple(prompts), tuple(presets), np.array(right))


def game_of(bench: Bench, lm: LocalLM, presets, config: AttackOptions, seed: int) -> TransferGame:
    """Every attacker against every width, on the questions of one seed."""
    if bench.chats is not None:
        return chat_game(bench, lm, presets, config, seed)
    with tempfile.TemporaryDirectory() as folder:
        return one_seed(lm, presets, config, seed, Path(folder))


def keep_game(rows: Rows, key: dict[str, Any], game: TransferGame) -> None:
    """A row with the score of every attacker, defender and item."""
    right = [[[round(float(x), 4) for x in row] for row in rows_DN] for rows_DN in game.right_ADN]
    rows.write(key, {"attackers": game.attackers, "defenders": game.defenders, "right": right})


def key_of(bench: Bench, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What tells one row from another."""
    sizes = {name: getattr(options, name) for name in ("items", "steps", "tries", "tokens")}
    return {"part": options.part, "model": bench.name, "on": bench.device.type, **more, **sizes}


def swaps(bench: Bench, rows: Rows, options: argparse.Namespace) -> None:
    """The transfer matrix of token swaps, a row per seed."""
    lm = nested(bench)
    for seed in options.seeds:
        key = key_of(bench, options, method=options.method, presets=options.presets, seed=seed)
        if not rows.has(key):
            keep_game(rows, key, game_of(bench, lm, options.presets, options_of(options), seed))


def options_of(options: argparse.Namespace) -> AttackOptions:
    """The attack asked for."""
    sizes = {name: getattr(options, name) for name in ("items", "steps", "tries", "tokens", "method")}
    return AttackOptions(**sizes)


def pgd(bench: Bench, rows: Rows, options: argparse.Namespace) -> None:
    """The transfer matrix in embedding space, a row per radius and seed; the embedded model only."""
    lm = nested(bench)
    for epsilon in options.epsilons:
        for seed in options.seeds:
            key = key_of(bench, options, epsilon=epsilon, presets=options.presets, seed=seed)
            if rows.has(key):
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = write_squad(Path(folder) / "r.json", synth.items("reading", options.items, PGD_SEED + seed))
                cases = build_cases(lm.tokenizer, file.questions(), file.answers(), place="swap")
            keep_game(rows, key, embedding_game(lm, cases, options.presets, epsilon=epsilon, seed=seed))


def batches(bench: Bench, *, steps: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """What the arms of rpt are trained on: reading questions of the training split, or training conversations."""
    if bench.chats is not None:
        rows = bench.lessons(seed).rows
        order = torch.randint(len(rows), (steps, size), generator=torch.Generator().manual_seed(seed)).tolist()
        return [as_batch([rows[row] for row in chosen], 0) for chosen in order]
    items = synth.items("reading", steps * size, seed, split="train")
    talks = [[*item.messages, {"role": "assistant", "content": item.answer}] for item in items]
    pairs = [encode_conversation(bench.tokenizer, talk) for talk in talks]
    found = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        ids, mask = pad([ids for ids, _ in part], 0)
        learn, _ = pad([[int(mine) for mine in ours] for _, ours in part], 0)
        found.append({"ids_BT": ids, "mask_BT": mask, "learn_BT": learn.bool()})
    return found


def trained(bench: Bench, arm: str, seed: int, options: argparse.Namespace) -> LocalLM:
    """The model after one way of training, every way with the same data and updates."""
    torch.manual_seed(seed)
    model, _ = bench.load()
    make_trainable(model, {name: Plan.uniform(name) for name in TRAINED}).to(bench.device)
    if arm != "none":

        def forward(part: Any, preset: str) -> torch.Tensor:
            return logits_of(use(model, preset), part)

        inner = Cascade("joint", teacher=False)
        objective = Adversarial(inner, model, epsilon=options.epsilon, iterations=2, seed=seed)
        schedule: Any = Drawn(seed) if arm == "rpt" else Fixed("w8")
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=options.rate, weight_decay=0)
        for step, batch in enumerate(batches(bench, steps=options.updates, size=12, seed=seed)):
            moved = {name: tensor.to(bench.device) for name, tensor in batch.items()}
            loss, _ = objective(forward, moved, schedule(step, TRAINED))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
    return view(bench, freeze(model.cpu()))


def rpt(bench: Bench, rows: Rows, options: argparse.Namespace) -> None:
    """Every arm under every attacker, a row per arm and seed."""
    for seed in options.seeds:
        for arm in options.arms:
            key = key_of(bench, options, arm=arm, updates=options.updates, seed=seed)
            if not rows.has(key):
                lm = trained(bench, arm, seed, options)
                keep_game(rows, key, game_of(bench, lm, TRAINED, options_of(options), seed))


def grid(options: argparse.Namespace) -> None:
    """EM and perplexity of every width of weights with every width of activations."""
    lm = LocalLM(*open_model(options.checkpoint))
    windows, _ = read_windows("embedded-test", lm.tokenizer, 256, count=16)
    print("| weights | activations | EM (95 % interval) | by seed | perplexity |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = [
            write_squad(Path(folder) / f"{s}.json", synth.items("reading", options.items, GRID_SEED + s))
            for s in options.seeds
        ]
        for weight in WEIGHTS:
            for activation in (16, *ACTIVATIONS):
                with lm.at(f"w{weight}" if activation == 16 else f"w{weight}a{activation}"):
                    answer = squad.generative(lm)
                    right = [squad.run(answer, f.questions(), f, Path(folder) / "said.json")["em"] for f in files]
                    nll = token_nll(lm, windows)
                em = bootstrap(np.concatenate(right))
                print(
                    f"| {weight} | {'float' if activation == 16 else activation} | {100 * em.value:.1f} "
                    f"({100 * em.low:.1f}-{100 * em.high:.1f}) | {', '.join(f'{100 * r.mean():.0f}' for r in right)} | "
                    f"{np.exp(nll.mean()):.3f} |",
                    flush=True,
                )


def pooled(rows: list[dict[str, Any]]) -> TransferGame:
    """The games of several seeds as one: their items are different ones."""
    right = np.concatenate([np.array(row["right"]) for row in rows], axis=2)
    return TransferGame(tuple(rows[0]["attackers"]), tuple(rows[0]["defenders"]), right)


def print_game(game: TransferGame, seeds: int) -> None:
    """The matrix, what transfers, and a drawn width against the best fixed one, with bootstrap intervals over items."""
    shown = lambda e: f"{100 * e.value:.1f} ({100 * e.low:.1f}–{100 * e.high:.1f})"  # noqa: E731
    print(f"\n{game.right_ADN.shape[2]} items, {seeds} seeds; 100 x mean score, 95 % intervals\n")
    print("| attacked at | " + " | ".join(game.defenders) + " | drawn per prompt |")
    print("|---" * (len(game.defenders) + 2) + "|")
    for attacker in game.attackers:
        cells = [shown(bootstrap(game.cell(attacker, name))) for name in game.defenders]
        print(f"| {attacker} | {' | '.join(cells)} | {shown(bootstrap(game.against([attacker]).mean(1)[0]))} |")
    own = np.mean([game.cell(name, name) for name in game.defenders], axis=0)
    pairs = [(a, d) for a in game.defenders for d in game.defenders if a != d]
    other = np.mean([game.cell(a, d) for a, d in pairs], axis=0)
    print(f"\nother widths {shown(bootstrap(other))}, own {shown(bootstrap(own))}, ", end="")
    print(f"difference {shown(bootstrap(other, paired_with=own))}")
    for label, names in (("single-width", list(game.defenders)), ("all", [*game.defenders, ADAPTIVE])):
        best = game.best_fixed(names)
        fixed, drawn = game.fixed(best, names), game.drawn(names)
        gain = bootstrap(drawn, paired_with=fixed)
        print(
            f"{label} attackers: best fixed {best} {shown(bootstrap(fixed))}, drawn {shown(bootstrap(drawn))}, ", end=""
        )
        print(f"gain {shown(gain)}")


def tables(options: argparse.Namespace) -> None:
    """Everything in DIR, seeds pooled."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(options.work / "rows.jsonl"):
        if row["part"] in ("swaps", "pgd", "rpt"):
            label = {k: v for k, v in row.items() if k not in ("seed", "attackers", "defenders", "right")}
            groups.setdefault(str(label), []).append(row)
    for label, rows in groups.items():
        print(f"\n## {label}")
        print_game(pooled(rows), len(rows))
    print_training(groups)


def print_training(groups: dict[str, list[dict[str, Any]]]) -> None:
    """Random precision training against the best fixed width of training at w8: means over seeds."""
    for model in sorted({rows[0]["model"] for rows in groups.values() if rows[0]["part"] == "rpt"}):
        arms = {r[0]["arm"]: r for r in groups.values() if r[0]["part"] == "rpt" and r[0]["model"] == model}
        everyone = [*TRAINED, ADAPTIVE]
        print(f"\n## {model}, random precision training; 100 x mean score under the worst attacker\n")
        print("| training | clean | " + " | ".join(TRAINED) + " | drawn |\n|" + "---|" * (len(TRAINED) + 3))
        by_seed: dict[str, dict[int, dict[str, float]]] = {}
        for arm, rows in arms.items():
            found = by_seed[arm] = {}
            for row in rows:
                game = pooled([row])
                found[row["seed"]] = {"clean": float(game.against([NOBODY]).mean())}
                found[row["seed"]] |= {name: float(game.fixed(name, everyone).mean()) for name in TRAINED}
                found[row["seed"]]["drawn"] = float(game.drawn(everyone).mean())
            columns = ("clean", *TRAINED, "drawn")
            print(f"| {arm} | " + " | ".join(cell([100 * s[c] for s in found.values()]) for c in columns) + " |")
        if set(ARMS) <= set(by_seed):
            shared = sorted(set.intersection(*(set(found) for found in by_seed.values())))
            gains = [
                100 * (by_seed["rpt"][s]["drawn"] - max(by_seed["adversarial at w8"][s][name] for name in TRAINED))
                for s in shared
            ]
            print(f"\nRPT, drawn, over the best fixed width of the other: {cell(gains)} points, {len(shared)} seeds")


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("grid", "swaps", "pgd", "rpt", "tables"))
    parser.add_argument("checkpoint", nargs="?", default="")
    parser.add_argument("--work", type=Path, default=Path("robustness"))
    parser.add_argument("--data", type=Path, help="where prepared codes are found and kept (default: --work)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="tinychat")
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--items", type=int)
    parser.add_argument("--presets", nargs="+", default=["w8", "w6", "w4", "w3", "w2"])
    parser.add_argument("--method", default="greedy")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    options = parser.parse_args()
    options.items = options.items or {"grid": 100, "pgd": 64}.get(options.part, 24)
    if options.part in ("grid", "tables"):
        return {"grid": grid, "tables": tables}[options.part](options)
    device = device_of(options.device)
    bench = Bench(options.data or options.work, model=options.model, chats=options.chats, items=1, device=device)
    rows = Rows(options.work / "rows.jsonl")
    return {"swaps": swaps, "pgd": pgd, "rpt": rpt}[options.part](bench, rows, options)


if __name__ == "__main__":
    main()
