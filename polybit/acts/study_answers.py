"""What the answers of one model are against the float model's, prompt by prompt, so that everything can be paired."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError, atomic_path, track
from polybit.data.batches import buckets
from polybit.data.chat import Prompt, encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template
from polybit.evals import tasks
from polybit.evals.choices import ChoiceSet, gate, score
from polybit.evals.perplexity import token_nll
from polybit.evals.token_flip import first_divergence
from polybit.hub.lm import LocalLM
from polybit.train.distill import token_divergence
from polybit.train.forward import logits_of
from polybit.train.material import PairMaterial, Scored
from polybit.train.preference import sum_rows

Told = dict[str, Any]
POOL = 2496  # prompts of a source that are drawn from


@dataclass(frozen=True, slots=True)
class Exam:
    """What every model is measured on: prompts with the float model's answers, windows of text, sets of questions.

    task_items: questions of each task of the embedded generator, 0 = none are asked.
    """

    prompts: list[list[int]]
    answers: list[Scored]
    windows_NT: Tensor
    sets: Sequence[ChoiceSet]
    task_items: int
    max_tokens: int


def split_prompts(lm: LocalLM, sources: Sequence[str], out: Path, *, train: int, test: int, longest: int) -> None:
    """Write out/train.jsonl and out/test.jsonl: shuffled prompts of all sources, none in both, none longer than
    `longest` tokens. More prompts to train on leave those that are measured as they are."""
    chat = has_chat_template(lm.tokenizer)
    seen: dict[str, Prompt] = {}
    for source in sources:
        for prompt in gather_prompts(source, chat=chat, limit=max(POOL, 2 * (train + test))):
            seen.setdefault(json.dumps(prompt, ensure_ascii=False), prompt)
    order = sorted(seen)
    random.Random(0).shuffle(order)
    short = [key for key in order if len(encode_prompt(lm.tokenizer, seen[key])) <= longest][: train + test]
    if len(short) < train + test:
        raise PolybitError(
            f"--prompts {', '.join(sources)!r:.120} give {len(short)} prompts of at most {longest} tokens, and "
            f"{train + test} are asked for: lower --train-prompts, or raise --prompt-tokens"
        )
    for name, keys in (("train", short[test:]), ("test", short[:test])):
        with atomic_path(out / f"{name}.jsonl") as staged:
            rows = (seen[key] if isinstance(seen[key], str) else {"messages": seen[key]} for key in keys)
            lines = (json.dumps({"prompt": row} if isinstance(row, str) else row, ensure_ascii=False) for row in rows)
            staged.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@torch.inference_mode()
def examined(lm: LocalLM, exam: Exam, label: str) -> Told:
    """Numbers of one model as it now reads: per prompt flips, tokens, KL, margins (sums over the float answer), its own
    answer and how much of it is shared; nats of each window; right or wrong for each question."""
    found: Told = {key: [0.0] * len(exam.prompts) for key in ("flips", "tokens", "kl", "margin")}
    material = PairMaterial(exam.prompts, list(exam.answers), {}, lm.pad_token())
    lengths = [len(p) + len(a.tokens) for p, a in zip(exam.prompts, exam.answers, strict=True)]
    kept = max(1, lm.batch_logits // lm.vocabulary // exam.max_tokens)
    for rows in track(buckets(lengths, tokens=lm.batch_tokens, rows=kept), f"{label}: float answers"):
        part = material.part(rows, [exam.answers[n] for n in rows], [0] * len(rows))
        part = {name: tensor.to(lm.device) for name, tensor in part.items()}
        for key, values in sums(logits_of(lm.model, part).float(), part).items():
            for n, value in zip(rows, values, strict=True):
                found[key][n] = value
    found["answers"] = lm.generate_tokens(exam.prompts, max_tokens=exam.max_tokens, label=f"{label}: own answers")
    pairs = zip(exam.answers, found["answers"], strict=True)
    stars = [(first_divergence(scored.tokens, own), len(scored.tokens)) for scored, own in pairs]
    found["shared"] = [length if star is None else star for star, length in stars]
    found["same"] = [star is None for star, _ in stars]
    found["nll"] = token_nll(lm, exam.windows_NT).mean(axis=1).tolist()
    found["tasks"] = task_scores(lm, exam, label)
    return found


def sums(logits_NV: Tensor, part: dict[str, Tensor]) -> dict[str, list[float]]:
    """Sums over the tokens of each answer of a batch."""
    top_N2 = logits_NV.softmax(-1).topk(2, -1).values
    values = {
        "flips": (logits_NV.argmax(-1) != part["top_index_NK"][:, 0]).float(),
        "tokens": torch.ones_like(top_N2[:, 0]),
        "kl": token_divergence(logits_NV, part["top_logp_NK"], part["top_index_NK"]),
        "margin": top_N2[:, 0] - top_N2[:, 1],
    }
    rows = len(part["tokens_B"])
    return {key: sum_rows(value_N, part["row_N"], rows).tolist() for key, value_N in values.items()}


def task_scores(lm: LocalLM, exam: Exam, label: str) -> dict[str, list[bool]]:
    """set -> right or wrong of each question: by log-likelihood (per character where the answers differ in length),
    GSM8K by what is written, tasks of the embedded generator exactly."""
    found: dict[str, list[bool]] = {}
    for asked in exam.sets:
        gate(asked)
        said = score(lm, asked, label=label)
        letters = asked.form == "letters" or bool(getattr(asked.items[0], "letters", False))
        metric = "flexible" if asked.is_sums else "acc" if letters else "acc_norm"
        found[asked.name] = said[metric].tolist()
    if exam.task_items:
        for name, items in tasks.embedded_items(exam.task_items, seed=3).items():
            answers = tasks.predict(lm, name, tasks.questions(items))
            right = tasks.score(answers, tasks.gold(items))[tasks.find_task(name).correct]
            found[name] = right.astype(bool).tolist()
    return found
