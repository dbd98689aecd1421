"""Switchable training measured: one model for several presets against models trained for one preset each.

    python benchmarks/switchable.py sets --work DIR [--model tinychat] [--sets w wa] [--arms ...] [--seeds 0 1 2 3 4]
    python benchmarks/switchable.py recover|cyclic|cost --work DIR ...
    python benchmarks/switchable.py prepare --work DIR          (starting codes and rows, on a machine with polybit)
    python benchmarks/switch_tables.py DIR                      (tables of all rows in DIR)

Parts: sets (one model over several presets, every method, against independent models), recover (how much of the loss
of post-training quantization training takes back), cyclic (CPT against static precision, from scratch), cost (a step
over P presets against P steps). Rows are JSON lines in DIR/rows.jsonl; a row that is there is not measured again.
Several processes may write into one DIR: give each its own --arms, --seeds, --sets or --presets.

Another model than the embedded one: --model PATH --chats FILE, conversations as in soda_chat. Scores, all on held-out
rows and teacher-forced: the share of replies given word for word (for greedy decoding the same as writing them; the
embedded model only), nats per token, KL to the float model. A switchable model's *share* of the independent one's
score is the ratio of exact replies; where there are none, exp(nats of the independent model - its own nats): the
ratio of the probabilities per token (geometric means) the two give to the right words.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench_rows import Rows, device_of
from switch_bench import BATCH, FREEDOM, RATE, Bench, fit, objective_of

from polybit.core.plan import Plan
from polybit.hub.load import load
from polybit.hub.tiny import path as embedded
from polybit.train.cascade import Cascade
from polybit.train.latent import Freedom, make_trainable, quantized_names
from polybit.train.schedules import Drawn, Fixed, Sandwich, cyclic, every

SETS = {"w": ("w8", "w6", "w4", "w3"), "wa": ("w8a8", "w4a4", "w3a4")}
SHARED = "--widths 8,6,4,3 --group-size 0"
ALONE = "--bits {} --method gptq --group-size 0"
ARMS: dict[str, dict[str, Any]] = {
    "cdt": {},
    "cdt random": {"schedule": "random"},
    "cdt sandwich": {"schedule": "sandwich"},
    "cdt balanced": {"balance": "gradient"},
    "joint": {"method": "joint"},
    "sp": {"method": "sp"},
    "recursive": {"method": "recursive"},
    # codes of its own for every width, from plain rounding: there is no shared file to start from
    "nested adapters": {"adapter": "nested", "rank": 16},
    # the shared file stays as it is, norms are trained; adapters of each preset beside it
    "lora": {"adapter": "lora", "rank": 8, "base": False},
}


def sets(bench: Bench, rows: Rows, knobs: argparse.Namespace) -> None:
    """One model for a set of presets against one model for each."""
    for seed in knobs.seeds:
        for group in knobs.sets:
            for name in SETS[group] if "independent" in knobs.arms else ():
                if knobs.presets is None or name in knobs.presets:
                    one_alone(bench, rows, knobs, group, name, seed)
            for arm in [arm for arm in knobs.arms if arm != "independent"]:
                one_arm(bench, rows, knobs, group, arm, seed)


def key_of(bench: Bench, knobs: argparse.Namespace, part: str, **more: Any) -> dict[str, Any]:
    """What tells one row from another."""
    given = {"steps": knobs.steps, "batch": knobs.batch, "rate": knobs.rate, "items": knobs.items}
    given["held_out"] = knobs.held_out
    return {"part": part, "model": bench.name, "on": bench.device.type, **more, **given}


def one_alone(bench: Bench, rows: Rows, knobs, group: str, name: str, seed: int) -> None:
    """A model trained for one preset, from GPTQ of its own width."""
    key = key_of(bench, knobs, "sets", set=group, arm="independent", preset=name, seed=seed)
    if rows.has(key):
        return
    plan = Plan.uniform(name)
    model = bench.trainable(ALONE.format(plan.default.w), {name: plan})
    before = bench.measure(model, (name,)) if seed == 0 else {}
    how = {"seed": seed, "steps": knobs.steps, "rate": knobs.rate, "batch": knobs.batch}
    spent = fit(bench, model, objective_of("independent", bench, knobs.labels), (name,), **how)
    rows.write(key, {**spent, "start": before, "end": bench.measure(model, (name,))})


def one_arm(bench: Bench, rows: Rows, knobs, group: str, arm: str, seed: int) -> None:
    """One model for all presets of a set."""
    key = key_of(bench, knobs, "sets", set=group, arm=arm, seed=seed)
    if rows.has(key):
        return
    how, names = ARMS[arm], SETS[group]
    plans = {name: Plan.uniform(name) for name in names}
    kind = how.get("adapter", "none")
    freedom = Freedom(others="norms", margin=0.5, base=how.get("base", True), rank=how.get("rank", 16))
    own = {"adapter": kind, "group_size": 0, "freedom": freedom} if kind != "none" else {"freedom": FREEDOM}
    model = bench.trainable(None if kind == "nested" else SHARED, plans, **own)
    before = bench.measure(model, (*names, "float")) if seed == 0 and arm in ("cdt", "nested adapters") else {}
    schedule = {"all": every, "random": Drawn(seed), "sandwich": Sandwich(seed)}[how.get("schedule", "all")]
    spent = fit(
        bench, model, objective_of(how.get("method", "cdt"), bench, knobs.labels), names, seed=seed,
        schedule=schedule, steps=knobs.steps, rate=knobs.rate, batch=knobs.batch, balance=how.get("balance", "sum"),
    )  # fmt: skip
    rows.write(key, {**spent, "start": before, "end": bench.measure(model, names)})


RECOVER = {  # preset -> (start, what else is trained, weight of the data)
    "w2": ("--bits 2 --method gptq --group-size 64", False, 1.0),
    "w4a4": (ALONE.format(4), "norms", 0.0),
}


def recover(bench: Bench, rows: Rows, knobs: argparse.Namespace) -> None:
    """What training takes back of the loss post-training quantization made, one preset alone.

    2 bits learn from the data and the float model. w4a4 learns from the float model alone, its norms too: what 4-bit
    activations lose, weights alone cannot give back.
    """
    for seed in knobs.seeds:
        for name in knobs.presets or RECOVER:
            flags, others, labels = RECOVER[name]
            key = key_of(bench, knobs, "recover", preset=name, seed=seed, others=others)
            if rows.has(key):
                continue
            freedom = Freedom(others=others)
            model = bench.trainable(flags, {name: Plan.uniform(name)}, freedom=freedom)
            before = bench.measure(model, (name, "float"))
            objective = Cascade("independent", data=labels, source=bench.teacher)
            how = {"seed": seed, "steps": knobs.steps, "rate": knobs.rate, "batch": knobs.batch}
            spent = fit(bench, model, objective, (name,), **how)
            rows.write(key, {**spent, "start": before, "end": bench.measure(model, (name,))})


def cost(bench: Bench, rows: Rows, knobs: argparse.Namespace) -> None:
    """Seconds of a step over P presets against one step for each, interleaved."""
    for group in knobs.sets:
        names = SETS[group]
        model = bench.trainable(SHARED, {name: Plan.uniform(name) for name in names})
        lessons = bench.lessons(0)
        given = {"batch": knobs.batch, "lessons": lessons}
        fit(bench, model, objective_of("cdt", bench), names, seed=0, steps=2, **given)
        for repeat in knobs.seeds:
            key = key_of(bench, knobs, "cost", set=group, repeat=repeat)
            if rows.has(key):
                continue
            spent: dict[str, Any] = {}
            schedules = {"all": every, "sandwich": Sandwich(0), "random": Drawn(0)}
            for arm, schedule in schedules.items():
                how = {"seed": 0, "steps": knobs.steps, "schedule": schedule}
                spent[arm] = fit(bench, model, objective_of("cdt", bench), names, **how, **given)
            for name in names:
                alone = objective_of("independent", bench)
                spent[name] = fit(bench, model, alone, (name,), seed=0, steps=knobs.steps, **given)
            rows.write(key, {"spent": spent})


def fresh(seed: int, layers: int, hidden: int):
    """A small Llama from scratch with the embedded model's vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": load(embedded())[0].config.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 4 * (hidden * 2 // 3 // 4),
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=torch.float32).eval()


CYCLES = {f"static {bits}": 0 for bits in (8, 6, 4)} | {f"cyclic {count}": count for count in (1, 8, 32)}


def cycles(bench: Bench, rows: Rows, knobs: argparse.Namespace) -> None:
    """CPT against static precision from scratch: same updates, measured at every width."""
    plans = {f"w{b}a{b}": Plan.uniform(f"w{b}a{b}") for b in (8, 7, 6, 5, 4)}
    names, steps = tuple(plans), knobs.steps
    for seed in knobs.seeds:
        for arm in [arm for arm in CYCLES if arm in knobs.arms or "independent" in knobs.arms]:
            key = key_of(bench, knobs, "cyclic", arm=arm, seed=seed, layers=knobs.layers, hidden=knobs.hidden)
            if rows.has(key):
                continue
            freedom = Freedom(scales="recomputed", others=True)
            model = make_trainable(fresh(seed, knobs.layers, knobs.hidden), plans, group_size=0, freedom=freedom)
            model.to(bench.device)
            schedule: Any = Fixed(f"w{arm[-1]}a{arm[-1]}")
            if CYCLES[arm]:
                schedule = cyclic(plans, quantized_names(model), steps=steps, cycles=CYCLES[arm])
            used = [schedule(step, names)[0] for step in range(steps)]
            # all arms and seeds read the same rows; the seed is that of the weights and of the order
            lessons = bench.lessons(0, knobs.rows)
            how = {"seed": seed, "steps": steps, "rate": knobs.rate, "batch": knobs.batch, "lessons": lessons}
            spent = fit(bench, model, Cascade("joint"), names, schedule=schedule, **how)
            squares = [plans[name].default.w * plans[name].default.a / 1024 for name in used]
            # forward at the cycle's bits; backward in float here: two thirds of the work at 32 x 32
            bitops = sum(squares) / len(squares)
            end = bench.measure(model, ("w8a8", "w6a6", "w4a4"))
            for measured in end.values():
                measured.pop("rows")
            rows.write(key, {**spent, "forward_bitops": bitops, "end": end})


def prepare(bench: Bench, rows: Rows, knobs: argparse.Namespace) -> None:
    """Make and keep every starting code, and the rows of every seed."""
    for flags in (SHARED, *(ALONE.format(bits) for bits in (8, 6, 4, 3)), *(flags for flags, _, _ in RECOVER.values())):
        bench.start(flags)
    for seed in knobs.seeds:
        bench.lessons(seed)
    if bench.chats is None:
        bench.lessons(0, knobs.rows)


PARTS = {  # part -> (what runs, steps, batch, rate)
    "sets": (sets, 40, BATCH, RATE),
    "recover": (recover, 100, 8, 2e-4),
    "cyclic": (cycles, 2000, 16, 2e-3),
    "cost": (cost, 6, BATCH, RATE),
    "prepare": (prepare, 1, BATCH, RATE),
}


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--work", type=Path, required=True, help="where rows are written")
    parser.add_argument("--data", type=Path, help="where prepared material is found and kept (default: --work)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="tinychat")
    parser.add_argument("--chats", type=Path, help="conversations to train and to measure another model on")
    parser.add_argument("--held-out", choices=["test", "validation"], default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--items", type=int, default=60, help="held-out questions of each embedded task")
    parser.add_argument("--rows", type=int, default=8000, help="training rows of the part cyclic")
    parser.add_argument("--layers", type=int, default=4, help="of the part cyclic")
    parser.add_argument("--hidden", type=int, default=128, help="of the part cyclic")
    parser.add_argument("--presets", nargs="+")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--labels", type=float, default=0.0, help="weight of the data beside the teachers")
    parser.add_argument("--arms", nargs="+", default=["independent", *ARMS])
    knobs = parser.parse_args()
    act, steps, batch, rate = PARTS[knobs.part]
    knobs.steps, knobs.batch, knobs.rate = knobs.steps or steps, knobs.batch or batch, knobs.rate or rate
    bench = Bench(
        knobs.data or knobs.work, model=knobs.model, chats=knobs.chats, items=knobs.items, part=knobs.held_out,
        device=device_of(knobs.device),
    )  # fmt: skip
    act(bench, Rows(knobs.work / "rows.jsonl"), knobs)


if __name__ == "__main__":
    main()
