"""Alignment: what each objective gives at equal prompts and steps. Rows go to a JSON-lines file, tables come from it.

    python benchmarks/alignment.py run --model MODEL --prompts FILE --text FILE --work DIR --bits 3 --rows start,kd
    python benchmarks/alignment.py table --work DIR

MODEL is any float causal LM (tinychat for the embedded one, whose own generator gives prompts and text). A row is
`name[@learning rate][:key=value...]`, as in kd@3e-4 or kd@1e-3:focus=doubt:strength=2. Rows already in the file are not
run again. Equal prompts, tokens and steps for all: `--steps` x `--batch` float answers; a pair counts as one prompt.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from polybit.commands.models import resolve
from polybit.core.affine import Grid
from polybit.core.plan import Plan
from polybit.data.chat import encode_prompt
from polybit.data.text import has_chat_template, read_documents, token_stream, windows
from polybit.hub.lm import LocalLM
from polybit.hub.load import load_float
from polybit.nn.convert import targets
from polybit.quant.table import QUANTIZERS
from polybit.train import align
from polybit.train.distill import Distillation, token_divergence
from polybit.train.forward import logits_of
from polybit.train.latent import Freedom, at, make_trainable
from polybit.train.material import Material, prepare
from polybit.train.pairs import Pair, first_divergence, sift
from polybit.train.preference import Preference, Stages
from polybit.train.probe import forget

RATES = {"kd": 3e-4, "qdpo-static": 1e-5, "qdpo-refreshed": 1e-4, "qdpo+kd": 1e-4, "ce": 3e-4}


def prompts_of(args, model, tokenizer) -> list[list[int]]:
    """Token prompts: first messages of the embedded generator, dialogues, or beginnings of stories."""
    if args.prompts == "embedded":
        from polybit.data import synth

        found = []
        for conversation in synth.conversations(6000, 11, split="train"):
            for turn, message in enumerate(conversation):
                if message["role"] == "user":
                    found.append(encode_prompt(tokenizer, conversation[: turn + 1]))
        room = model.config.max_position_embeddings - args.max_tokens
        return sift(found, room=min(room, 96)).prompts
    text = Path(args.prompts).read_text(encoding="utf-8")
    if has_chat_template(tokenizer):
        found = []
        for dialogue in text.split("\n\n"):
            messages = []
            for line in dialogue.replace("<|endoftext|>", "").splitlines():
                speaker, _, said = line.partition(": ")
                messages.append({"role": "user" if speaker == "User" else "assistant", "content": said.strip()})
                if speaker == "User":
                    found.append(encode_prompt(tokenizer, messages))
                    found.append(encode_prompt(tokenizer, messages[-1:]))
        return sift(found, room=120).prompts
    found = []
    for number, story in enumerate(read_documents(args.prompts)):
        for part, piece in enumerate(story.split("\n")):
            ids = encode_prompt(tokenizer, piece.strip())
            length = (8, 12, 16, 20, 24)[(number + part) % 5]
            if len(ids) >= 24:
                found.append(ids[:length])
    return sift(found, room=None).prompts


class Bench:
    """One model with its prompts, float answers, cached references and held-out measures."""

    def __init__(self, args) -> None:
        self.args = args
        self.model, self.tokenizer = load_float(resolve(args.model))
        self.kept: dict = {}
        self.lm = LocalLM(self.model, self.tokenizer)
        if args.no_eos:
            self.model.generation_config.eos_token_id = None
        prompts = prompts_of(args, self.model, self.tokenizer)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(7)).tolist()
        # held-out prompts share no beginning of 8 tokens with a training prompt
        picked = [prompts[i] for i in order]
        self.test = picked[: args.held_out]
        beginnings = {tuple(row[:12]) for row in self.test}
        rest = [row for row in picked[args.held_out :] if tuple(row[:12]) not in beginnings]
        self.train = rest[: args.train + args.probe]
        source = "embedded-test" if args.text == "embedded" else args.text
        stream = token_stream(self.tokenizer, read_documents(source) if source != "embedded-test" else self.dialogues())
        self.text_NT = windows(stream, 128, bos=self.tokenizer.bos_token_id, count=96)
        key = json.dumps([args.model, len(self.train), len(self.test), args.max_tokens, self.train[0]])
        self.key = hashlib.sha256(key.encode()).hexdigest()[:12]
        self.answers = self.cached("float", lambda: self.lm.generate_tokens(
            [*self.train, *self.test], max_tokens=args.max_tokens))  # fmt: skip

    def dialogues(self) -> list[str]:
        """Text of the embedded generator's test split."""
        from polybit.data.text import read_corpus

        return read_corpus("embedded-test", self.tokenizer).documents

    def cached(self, name: str, make):
        """Token lists kept between runs."""
        path = Path(self.args.work) / f"{self.key}-{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = make()
            path.write_text(json.dumps(found))
        return json.loads(path.read_text())

    # starts -----------------------------------------------------------------------------------------------------

    def grid(self, bits: int) -> Grid:
        """The grid of all rows of a table."""
        return Grid(bits, self.args.group_size, "group")

    def start(self, method: str, bits: int):
        """Codes of every target by a quantizer; calibrated on the float answers of training prompts where it needs."""
        model = self.model
        grid = self.grid(bits)
        if method == "rtn":
            return {t.name: QUANTIZERS["rtn"](t.weight_OI(model), None, grid) for t in targets(model)}
        from polybit.commands.compress import Recipe, compress

        rows = [[*p, *a] for p, a in zip(self.train, self.answers, strict=False)]
        joined = torch.tensor([token for row in rows for token in row])[: 128 * 128].view(128, 128)
        recipe = Recipe(method, grid, (bits,))

        class Nowhere:
            read = staticmethod(lambda block: None)
            write = staticmethod(lambda block, weights: None)

        found = {}
        twin = copy.deepcopy(model)
        for done in compress(twin, targets(twin), list(joined.split(8)), recipe, Nowhere()):
            found |= done
        return found

    def trainable(self, method: str, presets: dict[str, Plan], freedom: Freedom | None = None):
        """A fresh trainable model at its start."""
        twin = copy.deepcopy(self.model)
        bits = max(plan.default.w for plan in presets.values())
        start = self.start(method, bits) if len(presets) == 1 else None
        if method != "rtn":  # scales computed again from the weights would throw the start away
            freedom = freedom or Freedom(scales="learned", margin=self.args.margin)
        chosen = freedom or Freedom(scales=self.args.scales)
        return make_trainable(twin, presets, start=start, group_size=self.args.group_size, zero="group", freedom=chosen)

    def material(self, method: str, bits: int) -> tuple[Material, Material]:
        """Training rows with the start's answers, and the rows of the probe; renewed answers do not stay."""
        key = method, bits
        if key not in self.kept:
            self.kept[key] = self.make_material(method, bits)
        material, probe = self.kept[key]
        return replace(material, rejected=dict(material.rejected)), probe

    def make_material(self, method: str, bits: int) -> tuple[Material, Material]:
        """Score the pairs of a start."""
        name = f"{method}{bits}-g{self.args.group_size}"
        ours = self.cached(
            name, lambda: self.free_answers(self.trainable(method, {"w": Plan.uniform(bits)}), "w", self.train)
        )
        theirs = self.answers[: len(self.train)]
        pairs = [Pair.of(*row) for row in zip(self.train, theirs, ours, strict=True)]
        return prepare(self.lm, pairs).split(self.args.probe)

    def free_answers(self, model, preset: str, prompts) -> list[list[int]]:
        """Greedy answers of a trainable model at a preset."""
        lm = LocalLM(model, self.tokenizer, keep_decoded=False)
        with at(model, preset):
            found = lm.generate_tokens(prompts, max_tokens=self.args.max_tokens)
        forget(model)
        return found

    # measures ---------------------------------------------------------------------------------------------------

    def held_out(self) -> Material:
        """Float answers to the test prompts, scored once."""
        if not hasattr(self, "_test"):
            pairs = [Pair(p, a, a, None) for p, a in zip(self.test, self.answers[len(self.train) :], strict=True)]
            self._test = prepare(self.lm, pairs, preferences=False)
            self._float_nll = self.text_nll(self.model)
        return self._test

    @torch.no_grad()
    def measure(self, model, preset: str) -> dict[str, list[float]]:
        """Per-prompt numbers on the test prompts: flips, tokens, KL, shared beginning; nll per text window."""
        test = self.held_out()
        found: dict[str, list[float]] = {
            key: [] for key in ("flips", "tokens", "kl", "shared", "nll", "entropy", "lead")
        }
        with at(model, preset):
            for begin in range(0, len(test), 32):
                rows = range(begin, min(begin + 32, len(test)))
                part = test.part(rows, [test.chosen[r] for r in rows], [0] * len(rows))
                logits_NV = logits_of(model, part)
                flips_N = (logits_NV.argmax(-1) != part["top_index_NK"][:, 0]).float()
                kl_N = token_divergence(logits_NV, part["top_logp_NK"], part["top_index_NK"])
                p_NV = logits_NV.softmax(-1)
                entropy_N = -(p_NV * p_NV.clamp_min(1e-30).log()).sum(-1)
                top_N2 = p_NV.topk(2, -1).values
                for line in range(len(rows)):
                    mine = part["row_N"] == line
                    for key, value in (("flips", flips_N), ("kl", kl_N), ("entropy", entropy_N),
                                       ("lead", top_N2[:, 0] - top_N2[:, 1])):  # fmt: skip
                        found[key].append(float(value[mine].sum()))
                    found["tokens"].append(int(mine.sum()))
            found["nll"] = self.text_nll(model)
        answers = self.free_answers(model, preset, self.test)
        for scored, own in zip(test.chosen, answers, strict=True):
            star = first_divergence(scored.tokens, own)
            found["shared"].append(self.args.max_tokens if star is None else star)
        forget(model)
        return found

    @torch.no_grad()
    def text_nll(self, model) -> list[float]:
        """Mean negative log-likelihood of each window of text, nats per token."""
        found = []
        for ids_BT in self.text_NT.split(16):
            logp_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits.float().log_softmax(-1)
            found += (-logp_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0].mean(1)).tolist()
        return found

    # rows -------------------------------------------------------------------------------------------------------

    def objective(self, name: str, knobs: dict[str, str]):
        """(objective, changes of the course) of a row's name."""
        numbers = {k: v if k in ("focus", "kind", "answers") else float(v) for k, v in knobs.items()}
        distil = {k: v for k, v in numbers.items() if k in Distillation.__dataclass_fields__}
        every = int(numbers.get("refresh", max(1, self.args.steps // 10)))
        if name == "kd":
            return Distillation(**distil), {}
        if name == "features":
            return Features(float(numbers["weight"]), Distillation(**distil)), {}
        if name == "kd-own":
            return Distillation(answers="own", **{"kind": "reverse"} | distil), {"refresh_every": every}
        beta = float(numbers.get("beta", 0.1))
        if name == "qdpo-static":
            return Preference(beta), {}
        if name == "qdpo-refreshed":
            return Preference(beta), {"refresh_every": every}
        if name == "qdpo-nll":
            return Preference(beta, nll=1.0), {}
        if name == "ipo":
            return Preference(beta, "ipo"), {"refresh_every": every}
        if name == "qdpo+kd":
            gamma = float(numbers.get("gamma", 10))
            return Preference(beta, gamma=gamma, distill=Distillation()), {"refresh_every": every}
        if name == "kd-then-qdpo":
            second = Preference(beta, gamma=10, distill=Distillation())
            half = self.args.steps // 2
            return Stages([(Distillation(), half), (second, half)]), {"refresh_every": every}
        raise SystemExit(f"row {name} is not known")

    def run(self, spec: str, bits: int, method: str, seed: int) -> dict:
        """One row."""
        head, *rest = spec.split(":")
        name, _, rate = head.partition("@")
        knobs = dict(item.split("=") for item in rest)
        preset = f"w{bits}"
        model = self.trainable(method, {preset: Plan.uniform(bits)})
        record = {"row": spec, "bits": bits, "start": method, "seed": seed, "seconds": 0.0}
        if name != "start":
            objective, changes = self.objective(name, knobs)
            if isinstance(objective, Features):
                objective.blocks = list(
                    model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
                )
            material, probe = self.material(method, bits)
            course = align.Course(
                steps=self.args.steps, batch=self.args.batch, learning_rate=float(rate or RATES[name]), seed=seed,
                max_tokens=self.args.max_tokens, probes=self.args.probes,
                further={"save_strategy": "no"},
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as out:
                begin = time.process_time()
                outcome = align.run(
                    model, self.tokenizer, material, probe, objective, (preset,), out=Path(out),
                    course=replace(course, **changes),
                )  # fmt: skip
                record["seconds"] = time.process_time() - begin
                record["kept"] = outcome.picker.best["step"]
                record["reason"] = outcome.picker.reason()
                record["last"] = outcome.picker.history[-1]["presets"]
                record["probe_start"], record["probe_best"] = outcome.start[preset], outcome.best[preset]
        return record | {"measured": self.measure(model, preset)}

    def elastic(self, spec: str, widths: tuple[int, ...], seed: int) -> list[dict]:
        """One run over several widths: `elastic@3e-4:share=loss:steps=300`; with one width, its separate run."""
        head, *rest = spec.split(":")
        rate = head.partition("@")[2] or 3e-4
        knobs = dict(item.split("=") for item in rest)
        presets = {f"w{b}": Plan.uniform(b) for b in widths}
        freedom = Freedom(codes=knobs.get("codes"), scales=knobs.get("scales", self.args.scales))
        model = self.trainable("rtn", presets, freedom) if len(widths) > 1 else self.trainable("rtn", presets)
        material, probe = self.material("rtn", min(widths))
        steps = int(knobs.get("steps", self.args.steps))
        schedule = SCHEDULES[knobs.get("schedule", "all")]
        course = align.Course(
            steps=steps, batch=int(knobs.get("batch", self.args.batch)), learning_rate=float(rate), seed=seed,
            probes=self.args.probes, share=knobs.get("share", "loss"), schedule=schedule,
            further={"save_strategy": "no"},
        )  # fmt: skip
        found = []
        before = {name: self.measure(model, name) for name in presets} if knobs.get("before") else {}
        with tempfile.TemporaryDirectory() as out:
            begin = time.process_time()
            outcome = align.run(
                model, self.tokenizer, material, probe, Distillation(), tuple(presets), out=Path(out), course=course
            )
            seconds = time.process_time() - begin
        for name in presets:
            found.append({
                "row": spec, "widths": list(widths), "bits": int(name[1:]), "start": "nested", "seed": seed,
                "seconds": seconds, "kept": outcome.picker.best["step"], "reason": outcome.picker.reason(),
                "probe_start": outcome.start[name], "probe_best": outcome.best[name],
                "last": outcome.picker.history[-1]["presets"], "before": before.get(name),
                "measured": self.measure(model, name),
            })  # fmt: skip
        return found


class Features:
    """KD and, beside it, the relative squared distance of the hidden states after every block, over all tokens."""

    separable = True
    needs = frozenset({"chosen"})

    def __init__(self, weight: float, distill: Distillation) -> None:
        self.weight, self.distill, self.blocks = weight, distill, []

    def __call__(self, forward, batch, presets):
        part = batch["chosen"]
        mask = part["mask_BT"][..., None]
        total, logs = torch.zeros(()), {}
        with torch.no_grad():
            teacher, _ = self.states(forward, part, "float")
        for preset in presets:
            student, logits_NV = self.states(forward, part, preset)
            apart = [
                ((s - t).pow(2) * mask).sum() / (t.pow(2) * mask).sum() for s, t in zip(student, teacher, strict=True)
            ]
            loss = self.distill.loss(logits_NV, part)
            far = torch.stack(apart).mean()
            logs |= {"kd": float(loss.detach()), "far": float(far.detach())}
            total = total + loss + self.weight * far
        return total, logs

    def states(self, forward, part, preset):
        """Hidden states after every block, and the logits."""
        found = []
        hooks = [
            b.register_forward_hook(lambda m, i, o: found.append(o[0] if isinstance(o, tuple) else o))
            for b in self.blocks
        ]
        try:
            logits_NV = forward(part, preset)
        finally:
            for hook in hooks:
                hook.remove()
        return found, logits_NV


def pair_of(step: int, presets: tuple[str, ...]) -> tuple[str, ...]:
    """Two widths a step, in turn, so that four widths cost half of four runs."""
    first = step % len(presets)
    return tuple(presets[(first + k * (len(presets) // 2)) % len(presets)] for k in range(min(2, len(presets))))


SCHEDULES = {
    "all": align.every_preset,
    "pairs": pair_of,
    "turns": lambda step, presets: (presets[step % len(presets)],),
}


# tables -----------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray, weights: np.ndarray | None = None, *, draws: int = 2000, seed: int = 0):
    """Mean (ratio of sums) with its 95 % bootstrap interval over prompts."""
    weights = np.ones_like(values) if weights is None else weights
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    means = values[picks].sum(1) / weights[picks].sum(1)
    return values.sum() / weights.sum(), *np.quantile(means, [0.025, 0.975])


def average(records: list[dict]) -> dict[str, np.ndarray]:
    """Per-prompt numbers averaged over seeds."""
    keys = records[0]["measured"]
    return {key: np.mean([np.array(r["measured"][key], dtype=float) for r in records], axis=0) for key in keys}


def table(args) -> None:
    """Print the table of every (bits, start) in the file: mean over seeds, spread, and paired intervals against KD."""
    rows = [json.loads(line) for line in (Path(args.work) / "rows.jsonl").read_text().splitlines()]
    for bits, method in sorted({(r["bits"], r["start"]) for r in rows if "widths" not in r}, reverse=True):
        mine = [r for r in rows if (r["bits"], r["start"]) == (bits, method) and "widths" not in r]
        names = list(dict.fromkeys(r["row"] for r in mine))
        start = average([r for r in mine if r["row"] == "start"])
        plain = [r for r in mine if r["row"] == args.against]
        print(f"\n### {bits} bits from {method}\n")
        print("| row | seeds | flips | KL | ppl | t* | win / lose vs start | lead | entropy | kept | CPU s |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for name in names:
            found = [r for r in mine if r["row"] == name]
            m = average(found)
            flips = [np.sum(r["measured"]["flips"]) / np.sum(r["measured"]["tokens"]) for r in found]
            shared = np.concatenate([np.array(r["measured"]["shared"]) - start["shared"] for r in found])
            print(
                f"| {name} | {len(found)} | {np.mean(flips):.4f} ({min(flips):.4f}-{max(flips):.4f}) "
                f"| {m['kl'].sum() / m['tokens'].sum():.4f} | {np.exp(m['nll'].mean()):.3f} | {m['shared'].mean():.2f} "
                f"| {(shared > 0).mean():.2f} / {(shared < 0).mean():.2f} "
                f"| {m['lead'].sum() / m['tokens'].sum():.3f} | {m['entropy'].sum() / m['tokens'].sum():.3f} "
                f"| {np.mean([r.get('kept', 0) for r in found]):.0f} | {np.mean([r['seconds'] for r in found]):.0f} |"
            )
        if plain:
            print(f"\nAgainst {args.against}, paired by prompt and seed (95 %):\n")
            for name in names:
                against(name, [r for r in mine if r["row"] == name], plain)


def against(name: str, found: list[dict], plain: list[dict]) -> None:
    """Differences of one row to plain KD on the same prompts and seeds."""
    both = {r["seed"]: r["measured"] for r in found}.keys() & {r["seed"] for r in plain}
    if not both or name == plain[0]["row"]:
        return
    a = average([r for r in found if r["seed"] in both])
    b = average([r for r in plain if r["seed"] in both])
    flips = interval(a["flips"] - b["flips"], a["tokens"])
    kl = interval(a["kl"] - b["kl"], a["tokens"])
    nll = interval(a["nll"] - b["nll"])
    wins = [np.sign(np.array(r["measured"]["shared"], float) - np.array(p["measured"]["shared"], float))
            for r in found for p in plain if r["seed"] == p["seed"]]  # fmt: skip
    lose = interval(np.mean(wins, axis=0))
    spelled = ", ".join(f"{label} {v[0]:+.4f} [{v[1]:+.4f}, {v[2]:+.4f}]"
                        for label, v in (("flips", flips), ("KL", kl), ("nll", nll), ("win-lose", lose)))  # fmt: skip
    print(f"- {name} ({len(both)} seeds): {spelled}")


def main() -> None:
    """Run rows or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=("run", "table", "elastic"))
    parser.add_argument("--model", default="tinychat")
    parser.add_argument("--prompts", default="embedded")
    parser.add_argument("--text", default="embedded")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", default="3")
    parser.add_argument("--widths", default="8,4,3,2")
    parser.add_argument("--start", default="rtn")
    parser.add_argument("--rows", default="start,kd")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--probes", type=int, default=6)
    parser.add_argument("--train", type=int, default=2400)
    parser.add_argument("--probe", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=320)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--scales", default="recomputed")
    parser.add_argument(
        "--margin", type=float, default=0.1, help="of latent weights from their cells' borders, GPTQ, AWQ"
    )
    parser.add_argument("--no-eos", action="store_true")
    parser.add_argument("--against", default="kd@3e-4")
    args = parser.parse_args()
    if args.act == "table":
        return table(args)
    path = args.work / "rows.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    bench = Bench(args)
    widths = tuple(map(int, args.widths.split(",")))
    for seed in map(int, args.seeds.split(",")):
        for spec in args.rows.split(","):
            for bits in map(int, args.bits.split(",")):
                key = {"row": spec, "bits": bits, "start": args.start, "seed": seed}
                if args.act == "elastic":
                    key = {"row": spec, "widths": list(widths), "seed": seed}
                if any(all(r.get(k) == v for k, v in key.items()) for r in done):
                    continue
                made = (
                    bench.elastic(spec, widths, seed)
                    if args.act == "elastic"
                    else [bench.run(spec, bits, args.start, seed)]
                )
                with path.open("a") as handle:
                    handle.writelines(json.dumps(record) + "\n" for record in made)
                done += made
                for r in made:
                    m = r["measured"]
                    print(
                        f"{spec} w{r['bits']} seed {seed}: flips {sum(m['flips']) / sum(m['tokens']):.4f} "
                        f"KL {sum(m['kl']) / sum(m['tokens']):.4f} ppl {np.exp(np.mean(m['nll'])):.3f} "
                        f"t* {np.mean(m['shared']):.2f} kept {r.get('kept')} {r['seconds']:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
