"""One float model with its prompts, answers, starts and held-out measures; what takes time is kept in a directory."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.affine import Grid, QWeight
from polybit.core.plan import Plan
from polybit.data.chat import encode_prompt
from polybit.data.stream import token_stream
from polybit.data.text import has_chat_template, read_corpus, read_documents, windows
from polybit.evals import tasks
from polybit.hub.lm import LocalLM
from polybit.hub.load import load_float
from polybit.hub.models import resolve
from polybit.nn.convert import targets
from polybit.nn.switch import at
from polybit.quant.table import QUANTIZERS
from polybit.train.distill import token_divergence
from polybit.train.forward import logits_of
from polybit.train.latent import Freedom, make_trainable
from polybit.train.material import PairMaterial, prepare
from polybit.train.pairs import Pair, first_divergence, sift
from polybit.train.probe import forget

CALIBRATION = 128, 128  # windows and their length, of float answers to training prompts
GENERATED = 11  # seed of the embedded generator's prompts


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share. `eos` False: answers have all `max_tokens` tokens."""

    model: str
    prompts: str
    text: str
    work: Path
    train: int = 2400
    probe: int = 256
    held_out: int = 640
    max_tokens: int = 48
    group_size: int = 32
    eos: bool = True
    items: int = 100
    device: str = "cpu"


class Bench:
    """The model, its prompts split into training, probe and held-out ones, and everything cached about them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model, self.tokenizer = load_float(resolve(setting.model))
        if not setting.eos:
            self.model.generation_config.eos_token_id = None
        self.kept: dict[tuple[str, int], tuple[PairMaterial, PairMaterial]] = {}
        self.split_prompts()
        self.text_NT = self.read_text()
        key = json.dumps([setting.model.rstrip("/").rpartition("/")[2], len(self.train), len(self.test),
                          setting.max_tokens, setting.group_size, self.train[0]])  # fmt: skip
        self.folder = setting.work / hashlib.sha256(key.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.answers = self.cached("float", lambda: self.lm().generate_tokens(
            [*self.train, *self.test], max_tokens=setting.max_tokens))  # fmt: skip
        self.model.to(setting.device)
        self.float_tasks: dict[str, list[float]] | None = None
        self.scored: PairMaterial | None = None

    def lm(self, model: nn.Module | None = None) -> LocalLM:
        """The float model, or another one, as an LM."""
        most = 1 << 28 if self.setting.device == "cuda" else 1 << 24
        return LocalLM(model or self.model, self.tokenizer, keep_decoded=False, batch_logits=most)

    # prompts and text -------------------------------------------------------------------------------------------

    def split_prompts(self) -> None:
        """Held-out prompts share no beginning of 12 tokens with a training prompt."""
        setting, prompts = self.setting, self.read_prompts()
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(7)).tolist()
        picked = [prompts[i] for i in order]
        self.test = picked[: setting.held_out]
        beginnings = {tuple(row[:12]) for row in self.test}
        rest = [row for row in picked[setting.held_out :] if tuple(row[:12]) not in beginnings]
        self.train = rest[: setting.train + setting.probe]

    def read_prompts(self) -> list[list[int]]:
        """First messages of the embedded generator, turns of dialogues ("User: ..."), or beginnings of stories."""
        setting = self.setting
        if setting.prompts == "embedded":
            from polybit.data import synth

            talks = synth.conversations(4 * (setting.train + setting.held_out), GENERATED, split="train")
            found = [
                encode_prompt(self.tokenizer, talk[: turn + 1])
                for talk in talks for turn, message in enumerate(talk) if message["role"] == "user"
            ]  # fmt: skip
            room = self.model.config.max_position_embeddings - setting.max_tokens
            return sift(found, room=min(room, 96)).prompts
        if has_chat_template(self.tokenizer):
            talks = dialogues(Path(setting.prompts).read_text(encoding="utf-8"))
            found = [encode_prompt(self.tokenizer, part) for talk in talks for part in user_turns(talk)]
            return sift(found, room=120).prompts
        found = []
        for number, story in enumerate(read_documents(setting.prompts)):
            for part, piece in enumerate(story.split("\n")):
                ids = encode_prompt(self.tokenizer, piece.strip())
                if len(ids) >= 24:
                    found.append(ids[: (8, 12, 16, 20, 24)[(number + part) % 5]])
        return sift(found, room=None).prompts

    def read_text(self) -> Tensor:
        """Windows of text no prompt is from, for perplexity."""
        source = self.setting.text
        documents = read_corpus("embedded-test", self.tokenizer).documents if source == "embedded" else None
        stream = token_stream(self.tokenizer, read_documents(source) if documents is None else documents)
        return windows(stream, 128, bos=self.tokenizer.bos_token_id, count=96)

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON kept between runs; written whole, so that processes side by side cannot spoil it."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            staged = path.with_suffix(f".{os.getpid()}")
            staged.write_text(json.dumps(make()))
            staged.replace(path)
        return json.loads(path.read_text())

    # starts -----------------------------------------------------------------------------------------------------

    def start(self, method: str, bits: int, widths: tuple[int, ...] = ()) -> dict[str, QWeight]:
        """Codes of every target by a quantizer, made once; calibrated on the float answers of training prompts."""
        path = self.folder / f"{method}{bits}.pt"
        if not path.is_file():
            found = self.make_start(method, bits, widths or (bits,))
            staged = path.with_suffix(f".{os.getpid()}")
            torch.save(found, staged)
            staged.replace(path)
        found = torch.load(path, weights_only=False)
        return {name: moved(q, self.setting.device) for name, q in found.items()}

    def make_start(self, method: str, bits: int, widths: tuple[int, ...]) -> dict[str, QWeight]:
        """Quantize on the CPU, whatever the device of the runs, so that all of them start from the same codes."""
        model, grid = copy.deepcopy(self.model).cpu(), Grid(bits, self.setting.group_size, "group")
        if method == "rtn":
            return {t.name: QUANTIZERS["rtn"](t.weight_OI(model), None, grid) for t in targets(model)}
        from polybit.compress.loop import compress
        from polybit.compress.recipe import Recipe

        rows = [[*p, *a] for p, a in zip(self.train, self.answers, strict=False)]
        count, length = CALIBRATION
        joined = torch.tensor([token for row in rows for token in row])[: count * length].view(-1, length)
        found: dict[str, QWeight] = {}
        for done in compress(model, targets(model), list(joined.split(8)), Recipe(method, grid, widths)):
            found |= done
        return found

    def trainable(self, method: str, bits: int, margin: float | None = None, scales: str = "") -> nn.Module:
        """A fresh trainable model of one width at its start; plain rounding keeps its scales those of its weights,
        unless told otherwise."""
        margin = (0.0 if method == "rtn" else 0.1) if margin is None else margin
        scales = scales or ("recomputed" if method == "rtn" else "learned")
        freedom = Freedom(scales=scales, margin=margin)
        return make_trainable(
            copy.deepcopy(self.model), {f"w{bits}": Plan.uniform(bits)}, start=self.start(method, bits),
            group_size=self.setting.group_size, zero="group", freedom=freedom,
        )  # fmt: skip

    def material(self, method: str, bits: int) -> tuple[PairMaterial, PairMaterial]:
        """Training rows with the start's own answers, and the rows of the probe; renewed answers do not stay."""
        key = method, bits
        if key not in self.kept:
            make = lambda: self.free_answers(self.trainable(method, bits), f"w{bits}", self.train)  # noqa: E731
            ours = self.cached(f"answers-{method}{bits}", make)
            pairs = [Pair.of(*row) for row in zip(self.train, self.answers[: len(self.train)], ours, strict=True)]
            self.kept[key] = prepare(self.lm(), pairs).split(self.setting.probe)
        material, probe = self.kept[key]
        return replace(material, rejected=dict(material.rejected)), probe

    def free_answers(self, model: nn.Module, preset: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Greedy answers of a trainable model at a preset."""
        with at(model, preset):
            found = self.lm(model).generate_tokens(prompts, max_tokens=self.setting.max_tokens)
        forget(model)
        return found

    # measures ---------------------------------------------------------------------------------------------------

    def held_out(self) -> PairMaterial:
        """Float answers to the held-out prompts, scored once."""
        if self.scored is None:
            pairs = [Pair(p, a, a, None) for p, a in zip(self.test, self.answers[len(self.train) :], strict=True)]
            self.scored = prepare(self.lm(), pairs, preferences=False)
        return self.scored

    @torch.no_grad()
    def measure(self, model: nn.Module, preset: str) -> dict[str, list[float]]:
        """Per held-out prompt: flips, tokens, KL, entropy, lead of the first token (sums over its answer), length of
        the beginning shared with the float answer; nll per window of text; 1 or 0 per task item."""
        test = self.held_out()
        found: dict[str, list[float]] = {key: [] for key in ("flips", "tokens", "kl", "entropy", "lead")}
        with at(model, preset):
            for begin in range(0, len(test), 32):
                rows = range(begin, min(begin + 32, len(test)))
                part = test.part(rows, [test.chosen[r] for r in rows], [0] * len(rows))
                part = {name: tensor.to(self.setting.device) for name, tensor in part.items()}
                for key, values_B in row_sums(logits_of(model, part).float(), part).items():
                    found[key] += values_B
            found["nll"] = self.text_nll(model)
            found |= self.task_scores(model)
        answers = self.free_answers(model, preset, self.test)
        stars = [first_divergence(scored.tokens, own) for scored, own in zip(test.chosen, answers, strict=True)]
        found["shared"] = [self.setting.max_tokens if star is None else star for star in stars]
        forget(model)
        return found

    def text_nll(self, model: nn.Module) -> list[float]:
        """Mean negative log-likelihood of each window of text, nats per token."""
        found: list[float] = []
        for ids_BT in self.text_NT.to(self.setting.device).split(16):
            logp_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits.float().log_softmax(-1)
            found += (-logp_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0].mean(1)).tolist()
        return found

    def task_scores(self, model: nn.Module) -> dict[str, list[float]]:
        """ "task": exact answers of the embedded model's three tasks, or right endings among four of pieces of text."""
        if not self.setting.items:
            return {}
        if self.setting.text != "embedded":
            return {"task": self.right_endings(model)}
        found: list[float] = []
        for name, items in tasks.embedded_items(self.setting.items, seed=3).items():
            said = tasks.predict(self.lm(model), name, tasks.questions(items))
            found += tasks.score(said, tasks.gold(items))[tasks.find_task(name).correct].astype(float).tolist()
        return {"task": found}

    def right_endings(self, model: nn.Module) -> list[float]:
        """Windows of 64 tokens with the 16 that follow them or three others: 1 where their own is likeliest."""
        ids_NT = self.text_NT.to(self.setting.device)
        heads_NT, ends_NT = ids_NT[:, :64], ids_NT[:, 64:80]
        totals = []
        for other in range(4):
            both_NT = torch.cat([heads_NT, ends_NT.roll(7 * other, 0)], 1)
            logp_NTV = model(input_ids=both_NT[:, :-1], use_cache=False).logits[:, 63:].float().log_softmax(-1)
            totals.append(logp_NTV.gather(-1, both_NT[:, 64:, None])[..., 0].sum(1))
        return (torch.stack(totals).argmax(0) == 0).float().tolist()


def moved(q: QWeight, device: str) -> QWeight:
    """A quantized weight on another device."""
    there = {f.name: getattr(q, f.name) for f in fields(q)}
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in there.items()}
    return QWeight(**there | {"ratios": {b: ratio.to(device) for b, ratio in q.ratios.items()}})


def row_sums(logits_NV: Tensor, part: dict[str, Tensor]) -> dict[str, list[float]]:
    """Sums over the tokens of every answer of a batch."""
    p_NV = logits_NV.softmax(-1)
    top_N2 = p_NV.topk(2, -1).values
    values = {
        "flips": (logits_NV.argmax(-1) != part["top_index_NK"][:, 0]).float(),
        "tokens": torch.ones_like(top_N2[:, 0]),
        "kl": token_divergence(logits_NV, part["top_logp_NK"], part["top_index_NK"]),
        "entropy": -(p_NV * p_NV.clamp_min(1e-30).log()).sum(-1),
        "lead": top_N2[:, 0] - top_N2[:, 1],
    }
    lines = len(part["tokens_B"])
    zero_B = torch.zeros(lines, device=logits_NV.device)
    return {key: zero_B.index_add(0, part["row_N"], value_N).tolist() for key, value_N in values.items()}


def dialogues(text: str) -> list[list[dict[str, str]]]:
    """Messages of dialogues written as lines "User: ..." and "Bot: ...", with an empty line between two."""
    found = []
    for block in text.replace("<|endoftext|>", "").split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines()]
        found.append([
            {"role": "user" if who == "User" else "assistant", "content": said.strip()} for who, _, said in lines
        ])  # fmt: skip
    return found


def user_turns(talk: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The dialogue up to every message of the user, and that message alone."""
    turns = [turn for turn, message in enumerate(talk) if message["role"] == "user"]
    return [part for turn in turns for part in (talk[: turn + 1], talk[turn : turn + 1])]
