"""Two models answer the same prompts: a directory of pairs, shard by shard, by one process or several.

A directory appears whole or not at all; an interrupted run goes on after its last shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError, sha256_file, track, warn, write_json
from polybit.data.chat import Prompt, encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.stream import encode
from polybit.data.text import has_chat_template
from polybit.hub.directory import MANIFEST, check_output, output_lock, staged_directory
from polybit.hub.endpoint import Continue, Endpoint, Reply, ReplyCache, ask
from polybit.hub.lm import LocalLM, longest_input
from polybit.hub.load import load_float
from polybit.hub.models import device_of, open_model
from polybit.hub.workers import ALONE, Where, spread
from polybit.hub.workspace import Workspace, model_digest
from polybit.nn.convert import convert, targets
from polybit.nn.rotation import Rotation
from polybit.quant.rtn import rtn
from polybit.train.material import prepare, write_cache
from polybit.train.pairs import (
    SCORES,
    SHARDS,
    SUMMARY,
    answer_pairs,
    count,
    read_shard,
    scores_name,
    shard_name,
    sift,
    summary,
    write_shard,
)

Task = tuple[int, list[list[int]]]  # number of a shard, and its prompts as tokens


@dataclass(frozen=True)
class AskedModels:
    """Names from which a process makes both models: a float one, and what quantizes it.

    checkpoint: a polybit directory, None = the float model rounded to nearest at `precision`, with `group_size` weights
    a scale · rotation: of the checkpoint; its float model is stored as it was.
    """

    float_name: str
    checkpoint: str | None
    precision: str
    group_size: int
    trust_remote_code: bool = False
    rotation: Rotation | None = None


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What both models are asked, and how their answers are kept; decides the result together with the models.

    prompts: a source of prompts (data.prompts), at most `limit` of them · max_tokens: longest answer · top: likeliest
    tokens of the float model kept per token (material.kept_tokens) · shard: prompts per file · writer: who writes the
    float answers (default: the float model here) · float_only: the quantized model is not asked.
    """

    prompts: str
    limit: int | None = None
    max_tokens: int
    top: int | None = None
    shard: int
    writer: Endpoint | None = None
    float_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Hands:
    """Who does the work; changes nothing about the result (hub.workers.spread)."""

    where: Where = ALONE
    device: str = "auto"


def make_pairs(
    models: AskedModels, asking: Asking, out: Path, *, hands: Hands, overwrite: bool = False, restart: bool = False
) -> dict[str, Any]:
    """Have both models answer, and write the finished directory `out`; returns what was counted."""
    check_output(out, overwrite=overwrite)
    with output_lock(out):
        notes, shards = plan_shards(models, asking)
        store = Workspace(out, notes, restart=restart)
        try:
            answer_shards(models, shards, store.path, asking, hands)
            numbers = {**notes, **recount(store.path)}
            with staged_directory(out, overwrite=overwrite) as stage:
                gather_files(store.path, stage, numbers)
            store.discard()
        finally:
            store.close()
    return numbers


def are_made(directory: Path, models: AskedModels, asking: Asking) -> bool:
    """Whether a directory holds just these pairs, or the answers of both models where those of one are asked for."""
    if not (directory / SUMMARY).is_file():
        return False
    noted = summary(directory)
    asked, _ = plan_shards(models, asking)
    if asking.float_only:
        del asked["float_only"]
    return all(noted.get(key) == value for key, value in asked.items())


def plan_shards(models: AskedModels, asking: Asking) -> tuple[dict[str, Any], list[Task]]:
    """(what fixes the result, for the fingerprint; shards of token prompts)."""
    float_model, tokenizer = load_float(models.float_name, trust_remote_code=models.trust_remote_code)
    chat = has_chat_template(tokenizer)
    gathered = gather_prompts(asking.prompts, chat=chat, limit=asking.limit)
    if not chat and any(not isinstance(prompt, str) for prompt in gathered):
        warn("the tokenizer has no chat template, so conversations are given as their lines")
    longest = longest_input(float_model)
    room = None if longest is None else longest - asking.max_tokens
    if room is not None and room < 1:
        raise PolybitError(
            f"--max-tokens {asking.max_tokens} leaves no room for a prompt: the model reads {longest} tokens"
        )
    sifted = sift((encode_prompt(tokenizer, prompt) for prompt in gathered if not is_blank(prompt)), room=room)
    blank = sum(is_blank(prompt) for prompt in gathered)
    if not sifted.prompts:
        raise PolybitError(
            f"none of the {len(gathered)} prompts of {asking.prompts!r} can be answered ({blank} are empty, "
            f"{sifted.too_long} longer than {room} tokens): give others, or a smaller --max-tokens"
        )
    notes = {
        "reference": model_digest(float_model),
        "float_model": models.float_name,
        "checkpoint": models.checkpoint,
        "checkpoint_digest": checkpoint_digest(models.checkpoint),
        "precision": models.precision,
        "group_size": models.group_size,
        "max_tokens": asking.max_tokens,
        "top": asking.top,
        "shard": asking.shard,
        "writer": None if asking.writer is None else asking.writer.model,
        "float_only": asking.float_only,
        "prompts_digest": hashlib.sha256(json.dumps(sifted.prompts).encode()).hexdigest(),
        "empty": sifted.empty + blank,
        "duplicate": sifted.duplicate,
        "too_long": sifted.too_long,
    }
    cuts = range(0, len(sifted.prompts), asking.shard)
    return notes, [(number, sifted.prompts[cut : cut + asking.shard]) for number, cut in enumerate(cuts)]


def is_blank(prompt: Prompt) -> bool:
    """A prompt in which nobody says anything."""
    return not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()


def checkpoint_digest(checkpoint: str | None) -> str | None:
    """Digest of a checkpoint's manifest, which names the digests of its files."""
    manifest = Path(checkpoint or "") / MANIFEST
    return sha256_file(manifest) if checkpoint and manifest.is_file() else None


class PairMaker:
    """Answers and scores one shard of prompts; made once per process."""

    def __init__(self, models: AskedModels, directory: Path, asking: Asking, device: str) -> None:
        float_model, tokenizer = load_float(models.float_name, trust_remote_code=models.trust_remote_code)
        self.fingerprint = model_digest(float_model)
        self.reference = LocalLM(float_model.to(device_of(device)), tokenizer)
        quantized = None if asking.float_only else quantized_of(models).to(device_of(device))
        self.quantized = None if quantized is None else LocalLM(quantized, tokenizer)
        self.precision, self.directory, self.asking = models.precision, directory, asking

    def __call__(self, task: Task) -> dict[str, Any]:
        """Write the shard's answers and then its scores; returns what was counted."""
        number, prompts = task
        replies = self.directory / f"replies-{number:05d}.sqlite"
        writer = None if self.asking.writer is None else Written(self.reference, self.asking.writer, replies)
        with nullcontext() if self.quantized is None else self.quantized.at(self.precision):
            found = answer_pairs(writer or self.reference, self.quantized, prompts, self.asking.max_tokens)
        material = prepare(self.reference, found, top=self.asking.top, preferences=self.quantized is not None)
        write_cache(self.directory / scores_name(number), material, reference=self.fingerprint)
        write_shard(self.directory / shard_name(number), found)  # last: a shard that is there is whole
        replies.unlink(missing_ok=True)
        return count(found)


class Written:
    """The float model behind an endpoint: it writes, and the one here only says how its texts are spelt in tokens.

    cache: where replies are kept until their shard is whole
    """

    def __init__(self, lm: LocalLM, endpoint: Endpoint, cache: Path) -> None:
        self.lm, self.endpoint, self.cache = lm, endpoint, cache

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[str] = (), label: str = "generate"
    ) -> list[list[int]]:
        """Greedy answers as token ids, the EOS included where the model ended by itself."""
        asked = [Continue(tuple(prompt)) for prompt in prompts]
        replies = ask(self.endpoint, asked, ReplyCache(self.cache), label=label)
        silent = sum(reply is None for reply in replies)
        if silent:
            raise PolybitError(
                f"the endpoint at {self.endpoint.url} gave no answer to {silent} of {len(prompts)} prompts: run again, "
                "what it answered is kept"
            )
        pairs = zip(prompts, replies, strict=True)
        return [self.spelt(prompt, reply)[:max_tokens] for prompt, reply in pairs if reply is not None]

    def spelt(self, prompt: Sequence[int], reply: Reply) -> list[int]:
        """An answer as the tokens that read like it after its prompt."""
        ways = [encode(self.lm.tokenizer, reply.text).tolist()]
        before = encode(self.lm.tokenizer, "\n").tolist()
        ways.append(encode(self.lm.tokenizer, "\n" + reply.text).tolist()[len(before) :])  # without a blank at first
        exact = (way for way in ways if self.lm.decode(way, after=prompt) == reply.text)
        ended = [self.lm.tokenizer.eos_token_id] if reply.finish == "stop" else []
        return [*next(exact, ways[0]), *ended] or [self.lm.tokenizer.eos_token_id]


def quantized_of(models: AskedModels):
    """The quantized model: the checkpoint, or the float model rounded to nearest at the precision's width."""
    if models.checkpoint is not None:
        return open_model(models.checkpoint, trust_remote_code=models.trust_remote_code)[0]
    model, _ = open_model(models.float_name, trust_remote_code=models.trust_remote_code)
    grid = Grid(Precision.parse(models.precision).w, models.group_size, "group")
    return convert(model, {t.name: pack(rtn(t.weight_OI(model), None, grid)) for t in targets(model)})


def answer_shards(models: AskedModels, shards: Sequence[Task], directory: Path, asking: Asking, hands: Hands) -> None:
    """Make the shards that are not there yet."""
    missing = [task for task in shards if not (directory / shard_name(task[0])).is_file()]
    if not missing:
        return
    arguments = (models, directory, asking, hands.device)
    paths = [name for name in (models.float_name, models.checkpoint) if name is not None]
    results = spread(PairMaker, arguments, missing, where=hands.where, shared=directory, models=paths)
    for _ in track(results, "shards of prompts", len(shards), done=len(shards) - len(missing)):
        pass


def recount(directory: Path) -> dict[str, Any]:
    """Counts over all shards."""
    return count(pair for path in sorted(directory.glob(SHARDS)) for pair in read_shard(path))


def gather_files(source: Path, stage: Path, numbers: Mapping[str, Any]) -> None:
    """Link the finished shards into the directory that is to appear, and say what they are."""
    for path in sorted([*source.glob(SHARDS), *source.glob(SCORES)]):
        try:
            os.link(path, stage / path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, stage / path.name)
    write_json(stage / SUMMARY, dict(numbers))
