"""Switchable training measured: one model for several presets against models trained for one preset each.

    python benchmarks/switchable.py --work DIR --part sets --seeds 3 >> rows.jsonl

Parts: sets (one model over several presets, every method, against independent models), recover (how much of the loss
of post-training quantization training takes back), cyclic (CPT against static precision, from scratch), cost (a step
over P presets against P steps). Rows are JSON lines; a row that is in DIR/rows.jsonl is not measured again.

Scores: the share of held-out replies the model gives word for word (teacher-forced, which for greedy decoding is the
same thing), and nats per token. Training conversations and held-out items have no name in common.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from polybit.core.plan import Plan
from polybit.core.planes import unpack
from polybit.data import synth
from polybit.data.lessons import Lessons, conversation_lesson, read_lessons
from polybit.hub.load import load
from polybit.hub.tiny import path as embedded
from polybit.nn.switch import panel
from polybit.train.balance import Balance
from polybit.train.cascade import Cascade
from polybit.train.latent import Freedom, make_trainable, quantized_names
from polybit.train.schedules import Drawn, Sandwich, cyclic, every
from polybit.train.switchable import Course, rows_of, run

SETS = {"w": ("w8", "w6", "w4", "w3"), "wa": ("w8a8", "w4a4", "w3a4")}
SHARED = "--widths 8,6,4,3 --group-size 0"
FREEDOM = Freedom(others="norms", margin=0.5)
LENGTH, TRAIN_ROWS = 256, 2000
STEPS, BATCH, RATE = 40, 4, 3e-4


class Bench:
    """Models to start from, rows to train and to measure on, and the rows already measured."""

    def __init__(self, work: Path, *, items: int, rate: float = RATE, labels: float = 0.0, sets=tuple(SETS)) -> None:
        self.work, self.rate, self.labels, self.sets = work, rate, labels, sets
        work.mkdir(parents=True, exist_ok=True)
        self.log = work / "rows.jsonl"
        self.done = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []
        self.teacher, self.tokenizer = load(embedded())
        drawn = [item for task in synth.TASKS for item in synth.items(task, items, 77, split="test")]
        talks = [[*item.messages, {"role": "assistant", "content": item.answer}] for item in drawn]
        rows = [conversation_lesson([dict(m) for m in talk], self.tokenizer) for talk in talks]
        self.held_out = Lessons([row for row in rows if len(row.ids) <= LENGTH], 0, "items")

    def trainable(self, flags: str, plans, **more):
        """The float model, trainable, starting from the codes that `polybit quantize tinychat` makes; made once."""
        out = self.work / ("start " + flags).replace("-", "").replace(" ", "_").replace(",", "")
        if not out.is_dir():
            command = ["quantize", "tinychat", *flags.split(), "--samples", "64", "--no-measure", "--out", str(out)]
            subprocess.run([sys.executable, "-m", "polybit", *command], check=True, stdout=subprocess.DEVNULL)
        start = {name: unpack(layer.planes) for name, layer in panel(load(out)[0]).layers.items()}
        return make_trainable(load(embedded())[0], plans, start=start, **{"freedom": FREEDOM, **more})

    def lessons(self, seed: int) -> Lessons:
        """Conversations to train on, drawn anew for each seed."""
        return read_lessons("embedded", self.tokenizer, length=LENGTH, count=TRAIN_ROWS, seed=seed)

    def write(self, key: dict[str, Any], row: dict[str, Any]) -> None:
        """Print and keep a row."""
        line = json.dumps({**key, **row})
        print(line, flush=True)
        with self.log.open("a") as log:
            log.write(line + "\n")

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a row was measured before."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.done)

    def measure(self, model, presets) -> dict[str, dict[str, float]]:
        """Exact replies and nats per token at every preset, and the float model's."""
        found = {}
        for name in presets:
            rows = rows_of(model, self.held_out, name, size=32)
            total = float(rows["tokens"].sum())
            found[name] = {
                "exact": float((rows["wrong"] == 0).double().mean()),
                "nll": float(rows["nll"].sum()) / total,
                "kl": float(rows["kl"].sum()) / total,
                "wrong": float(rows["wrong"].sum()) / total,
            }
        return found


def fit(bench: Bench, model, objective, presets, *, seed: int, schedule=every, steps: int, further=None) -> float:
    """Train and return the seconds of CPU time it took."""
    further = dict(further or {})
    course = Course(
        steps=steps,
        batch=further.pop("batch", BATCH),
        learning_rate=further.pop("rate", bench.rate),
        probes=0,
        seed=seed,
        balance=further.pop("balance", Balance()),
    )
    out = Path(tempfile.mkdtemp(dir=bench.work))
    began = time.process_time()
    run(model, bench.lessons(seed), objective, presets, out=out, course=course, schedule=schedule)
    spent = time.process_time() - began
    shutil.rmtree(out)
    return spent


ARMS = {  # name -> (method, schedule, balance)
    "cdt": ("cdt", "all", "sum"),
    "cdt random": ("cdt", "random", "sum"),
    "cdt sandwich": ("cdt", "sandwich", "sum"),
    "cdt balanced": ("cdt", "all", "gradient"),
    "joint": ("joint", "all", "sum"),
    "sp": ("sp", "all", "sum"),
    "recursive": ("recursive", "all", "sum"),
}


def sets(bench: Bench, seeds: range, arms: list[str], steps: int) -> None:
    """One model for a set of presets against one model for each."""
    for seed in seeds:
        for group, names in ((key, SETS[key]) for key in bench.sets):
            plans = {name: Plan.uniform(name) for name in names}
            for name in names if "independent" in arms else ():
                key = {
                    "part": "sets",
                    "set": group,
                    "arm": "independent",
                    "preset": name,
                    "seed": seed,
                    "steps": steps,
                    "rate": bench.rate,
                }
                if not bench.has(key):
                    flags = f"--bits {plans[name].default.w} --method gptq --group-size 0"
                    model = bench.trainable(flags, {name: plans[name]})
                    before = bench.measure(model, (name,)) if seed == seeds[0] else {}
                    spent = fit(bench, model, objective_of("independent", bench), (name,), seed=seed, steps=steps)
                    bench.write(key, {"cpu": spent, "start": before, "end": bench.measure(model, (name,))})
            for arm in [arm for arm in arms if arm != "independent"]:
                key = {"part": "sets", "set": group, "arm": arm, "seed": seed, "steps": steps, "rate": bench.rate}
                if bench.has(key):
                    continue
                method, schedule, balance = ARMS[arm]
                model = bench.trainable(SHARED, plans)
                before = bench.measure(model, (*names, "float")) if seed == seeds[0] else {}
                chosen = {"all": every, "random": Drawn(seed), "sandwich": Sandwich(seed)}[schedule]
                spent = fit(
                    bench, model, objective_of(method, bench), names, seed=seed, schedule=chosen, steps=steps,
                    further={"balance": Balance(balance)},
                )  # fmt: skip
                bench.write(key, {"cpu": spent, "start": before, "end": bench.measure(model, names)})


def objective_of(method: str, bench: Bench) -> Cascade:
    """The objective of an arm; joint has nothing but the data."""
    return Cascade(method, data=1.0 if method == "joint" else bench.labels, source=bench.teacher)


def recover(bench: Bench, seeds: range, steps: int, presets: list[str]) -> None:
    """What training takes back of the loss post-training quantization made, one preset alone.

    2 bits learn from the data and the float model. w4a4 learns from the float model alone, its norms too: what 4-bit
    activations lose, weights alone cannot give back.
    """
    rows = {
        "w2": ("--bits 2 --method gptq --group-size 64", False, 1.0, 1e-3),
        "w4a4": ("--bits 4 --method gptq --group-size 0", "norms", 0.0, 2e-4),
    }
    for seed in seeds:
        for name in presets:
            flags, others, labels, rate = rows[name]
            key = {"part": "recover", "preset": name, "seed": seed, "steps": steps, "others": others}
            if bench.has(key):
                continue
            teacher = load(embedded())[0] if others else None
            model = bench.trainable(flags, {name: Plan.uniform(name)}, freedom=Freedom(others=others))
            before = bench.measure(model, (name, "float"))
            objective = Cascade("independent", data=labels, source=teacher)
            spent = fit(
                bench, model, objective, (name,), seed=seed, steps=steps, further={"rate": rate, "batch": 8}
            )  # fmt: skip
            bench.write(key, {"cpu": spent, "start": before, "end": bench.measure(model, (name,))})


def cost(bench: Bench, repeats: int) -> None:
    """CPU seconds of a step over P presets against one step for each, interleaved."""
    for group, names in SETS.items():
        plans = {name: Plan.uniform(name) for name in names}
        model = bench.trainable(SHARED, plans)
        fit(bench, model, objective_of("cdt", bench), names, seed=0, steps=2)
        for repeat in range(repeats):
            key = {"part": "cost", "set": group, "repeat": repeat}
            if bench.has(key):
                continue
            spent = {}
            for arm, schedule in (("all", every), ("sandwich", Sandwich(0))):
                spent[arm] = (
                    fit(bench, model, objective_of("cdt", bench), names, seed=0, steps=6, schedule=schedule) / 6
                )
            for name in names:
                spent[name] = fit(bench, model, objective_of("independent", bench), (name,), seed=0, steps=6) / 6
            bench.write(key, {"cpu": spent})


def fresh(seed: int):
    """A tiny Llama from scratch with the embedded model's vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": load(embedded())[0].config.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=torch.float32).eval()


def cycles(bench: Bench, seeds: range, steps: int) -> None:
    """CPT against static precision from scratch: same updates, measured at 8 bits."""
    plans = {f"w{b}a{b}": Plan.uniform(f"w{b}a{b}") for b in (8, 7, 6, 5, 4)}
    names = tuple(plans)
    for seed in seeds:
        for arm, count in (("static 8", 0), ("static 6", 0), ("cyclic", 1), ("cyclic", 8), ("cyclic", 32)):
            key = {"part": "cyclic", "arm": arm, "cycles": count, "seed": seed, "steps": steps}
            if bench.has(key):
                continue
            model = fresh(seed)
            make_trainable(model, plans, group_size=0, freedom=Freedom(scales="recomputed", others=True))
            if count:
                schedule = cyclic(plans, quantized_names(model), steps=steps, cycles=count)
            else:
                fixed = f"w{arm[-1]}a{arm[-1]}"
                schedule = lambda step, presets, fixed=fixed: (fixed,)  # noqa: E731
            used = [schedule(step, names)[0] for step in range(steps)]
            spent = fit(
                bench, model, Cascade("joint"), names, seed=seed, steps=steps, schedule=schedule,
                further={"rate": 5e-3},
            )  # fmt: skip
            squares = [plans[name].default.w * plans[name].default.a / 1024 for name in used]
            # forward at the cycle's bits; backward in float here: two thirds of the work at 32 x 32
            bitops = sum(squares) / len(squares)
            bench.write(key, {"cpu": spent, "forward_bitops": bitops, "end": bench.measure(model, (names[0], "w6a6"))})


T95 = {1: float("nan"), 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, two-sided 95 %, by number of seeds


def spread(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval."""
    mean = statistics.fmean(values)
    half = (
        T95.get(len(values), 2.6) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    )
    return mean, half


def tables(logs: list[Path]) -> None:
    """Markdown tables of everything measured: means over seeds, +- half a 95 % interval (Student's t over seeds)."""
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    for group, names in SETS.items():
        ours = [row for row in rows if row["part"] == "sets" and row["set"] == group]
        if not ours:
            continue
        alone = {(r["preset"], r["seed"]): r for r in ours if r["arm"] == "independent"}
        print(f"\n{group}: exact replies, % (share of the independent model's) | time over all independent runs\n")
        print("| arm | " + " | ".join(names) + " | time |\n|" + "---|" * (len(names) + 2))
        for arm in dict.fromkeys(row["arm"] for row in ours):
            cells, times = [], []
            for name in names:
                mine = [r for r in ours if r["arm"] == arm and r.get("preset", name) == name]
                exact = [100 * r["end"][name]["exact"] for r in mine]
                nll = [r["end"][name]["nll"] for r in mine]
                cell = "{:.1f} ± {:.1f}".format(*spread(exact))
                pairs = [(r, alone.get((name, r["seed"]))) for r in mine if arm != "independent"]
                shares = [100 * r["end"][name]["exact"] / a["end"][name]["exact"] for r, a in pairs if a]
                cells.append(
                    cell
                    + (" ({:.1f} ± {:.1f} %)".format(*spread(shares)) if shares else "")
                    + f" nll {statistics.fmean(nll):.4f}"
                )
            for row in [r for r in ours if r["arm"] == arm and arm != "independent"]:
                total = [alone[name, row["seed"]]["cpu"] for name in names if (name, row["seed"]) in alone]
                times += [row["cpu"] / sum(total)] if len(total) == len(names) else []
            print(
                f"| {arm} | "
                + " | ".join(cells)
                + " | "
                + ("{:.2f} ± {:.2f}".format(*spread(times)) if times else "1")
                + " |"
            )
        start = next((r["start"] for r in ours if r["arm"] == "cdt" and r["start"]), {})
        print("start: " + ", ".join(f"{n} {100 * v['exact']:.1f} % nll {v['nll']:.4f}" for n, v in start.items()))
    for row in [row for row in rows if row["part"] != "sets"]:
        print(json.dumps(row))


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=["sets", "recover", "cyclic", "cost", "tables"], required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--presets", nargs="+", default=["w2", "w4a4"], help="of the part recover")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--labels", type=float, default=0.0, help="weight of the data beside the teachers")
    parser.add_argument("--arms", nargs="+", default=["independent", *ARMS])
    knobs = parser.parse_args()
    torch.set_num_threads(1)
    if knobs.part == "tables":
        tables(sorted(knobs.work.glob("**/rows.jsonl")))
        return
    bench = Bench(knobs.work, items=knobs.items, rate=knobs.rate, labels=knobs.labels, sets=knobs.sets)
    seeds = range(knobs.first_seed, knobs.first_seed + knobs.seeds)
    if knobs.part == "sets":
        sets(bench, seeds, knobs.arms, knobs.steps or STEPS)
    elif knobs.part == "recover":
        recover(bench, seeds, knobs.steps or 100, knobs.presets)
    elif knobs.part == "cyclic":
        cycles(bench, seeds, knobs.steps or 240)
    else:
        cost(bench, knobs.seeds)


if __name__ == "__main__":
    main()
