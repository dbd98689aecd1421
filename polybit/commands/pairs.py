"""`polybit pairs`: what the float and the quantized model answer to the same prompts, with the reference's scores."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from polybit.core.runtime import PolybitError, track
from polybit.hub.models import device_of, open_model, resolve

if TYPE_CHECKING:  # `polybit VERB --help` loads no torch
    from polybit.nn.rotation import Rotation

DEFAULT_PRECISION = "w4"


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Flags of `polybit pairs`."""

    prompts: str
    """A .txt (one per line), .jsonl, .csv or .tsv file, a named set, or a dataset id (owner/name:config:split)."""
    out: Path
    """Directory of the pairs."""
    precision: str | None = None
    """Precision of the quantized model, as in w3 (default: a checkpoint's narrowest width, w4 for a float model)."""
    reference: str | None = None
    """The float model of a polybit checkpoint (default: the one it says it was made from)."""
    group_size: int = 64
    """Weights that share a scale where MODEL is a float model: it is then rounded to nearest."""
    limit: int | None = None
    """At most so many prompts."""
    max_tokens: int = 256
    """Longest answer."""
    top: int | None = None
    """Likeliest tokens of the float model to keep per token (default: all of a vocabulary up to 1024, else 64)."""
    shard: int = 512
    """Prompts per file; a run that is interrupted goes on after its last file."""
    workers: int = 1
    """Processes to spread the work over, each with both models."""
    ray: bool = False
    """Spread the work over a Ray cluster instead of processes of this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where both models answer (auto: a GPU where there is one)."""
    overwrite: bool = False
    """Replace existing pairs at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""
    json: Path | None = None
    """Write the run with all its numbers there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def pairs(model: str, /, *, config: Annotated[PairsConfig, Parameter(name="*")]) -> None:
    """Answer prompts with MODEL in float and quantized, and keep where the answers part.

    MODEL is a float model, which is then rounded to --precision, or a polybit checkpoint with its float model.
    """
    check(config)
    from polybit.core.records import Run

    run = Run("pairs", {"model": model, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}})
    with run.timed():
        run.numbers = make(model, config)
    if config.json is not None:
        run.write(config.json)
    numbers = run.numbers
    star = numbers["mean_first_divergence"]
    print(
        f"{config.out}: {numbers['pairs']} pairs at {numbers['precision']}, {numbers['identical']} identical answers "
        f"dropped, of {numbers['prompts']} prompts ({numbers['empty']} empty, {numbers['duplicate']} repeated and "
        f"{numbers['too_long']} over-long ones left out)."
    )
    if star is not None:
        print(f"Answers part after {star:.1f} of {numbers['mean_answer_tokens']:.1f} tokens on average.")
    print(next_step(model, config, numbers))


def next_step(model: str, config: PairsConfig, numbers: Mapping[str, Any]) -> str:
    """What to do with the pairs, or why there is nothing to do."""
    if not numbers["pairs"]:
        return (
            f"All answers are the same at {numbers['precision']}, so there is nothing to prefer: choose a lower "
            "precision, more prompts or longer answers (polybit align --method kd learns from these all the same)."
        )
    return f"Next: polybit align {model} --pairs {config.out} --precision {numbers['precision']} --out aligned"


def check(config: PairsConfig) -> None:
    """Refuse flags that make no sense before anything is loaded."""
    for flag, value in (("max-tokens", config.max_tokens), ("shard", config.shard), ("workers", config.workers)):
        if value < 1:
            raise PolybitError(f"--{flag} {value} is not possible: give 1 or more")
    for flag, given in (("limit", config.limit), ("top", config.top)):
        if given is not None and given < 2:
            raise PolybitError(f"--{flag} {given} is not possible: give 2 or more")


@dataclass(frozen=True)
class Models:
    """Names from which a process makes both models: a float one, and what quantizes it."""

    float_name: str
    checkpoint: str | None
    precision: str
    group_size: int
    trust_remote_code: bool = False
    rotation: Rotation | None = None  # of the checkpoint; its float model is stored as it was


def find_models(model: str, config: Any) -> Models:
    """Which float model and which quantized one MODEL means; `config` has precision, reference, group_size."""
    from polybit.compress.sizes import base_model, stored_widths
    from polybit.core.precision import FLOAT, Precision
    from polybit.nn.rotation import rotation_of

    loaded, _ = open_model(model, trust_remote_code=config.trust_remote_code)
    widths = stored_widths(loaded)
    narrowest = DEFAULT_PRECISION if widths is None else f"w{min(widths)}"
    precision = config.precision or narrowest
    if widths is None:
        if config.reference is not None:
            raise PolybitError(f"--reference {config.reference}: {model} is itself a float model, leave it out")
        if not 2 <= Precision.parse(precision).w < FLOAT:
            raise PolybitError(f"--precision {precision} leaves the weights in float: give w2 to w8")
        return Models(resolve(model), None, precision, config.group_size, config.trust_remote_code)
    parent = config.reference or base_model(loaded)
    if parent is None:
        raise PolybitError(f"{model} does not say which model it was made from: name it with --reference")
    rotation = rotation_of(loaded)
    return Models(resolve(parent), resolve(model), precision, config.group_size, config.trust_remote_code, rotation)


class PairMaker:
    """Answers and scores one shard of prompts; made once per process."""

    def __init__(self, models: Models, directory: Path, max_tokens: int, top: int | None, device: str) -> None:
        from polybit.hub.lm import LocalLM
        from polybit.hub.load import load_float

        float_model, tokenizer = load_float(models.float_name, trust_remote_code=models.trust_remote_code)
        self.fingerprint = fingerprint_of(float_model)
        self.reference = LocalLM(float_model.to(device_of(device)), tokenizer)
        self.quantized = LocalLM(quantized_of(models).to(device_of(device)), tokenizer)
        self.precision, self.directory, self.max_tokens, self.top = models.precision, directory, max_tokens, top

    def __call__(self, task: tuple[int, list[list[int]]]) -> dict[str, Any]:
        """Write the shard's answers and then its scores; returns what was counted."""
        from polybit.train.material import prepare, write_cache
        from polybit.train.pairs import answer_pairs, count, shard_name, write_shard

        number, prompts = task
        with self.quantized.at(self.precision):
            found = answer_pairs(self.reference, self.quantized, prompts, self.max_tokens)
        material = prepare(self.reference, found, top=self.top)
        write_cache(self.directory / scores_name(number), material, reference=self.fingerprint)
        write_shard(self.directory / shard_name(number), found)  # last: a shard that is there is whole
        return count(found)


def quantized_of(models: Models):
    """The quantized model: the checkpoint, or the float model rounded to nearest at the precision's width."""
    if models.checkpoint is not None:
        return open_model(models.checkpoint, trust_remote_code=models.trust_remote_code)[0]
    from polybit.core.affine import Grid
    from polybit.core.planes import pack
    from polybit.core.precision import Precision
    from polybit.nn.convert import convert, targets
    from polybit.quant.rtn import rtn

    model, _ = open_model(models.float_name, trust_remote_code=models.trust_remote_code)
    grid = Grid(Precision.parse(models.precision).w, models.group_size, "group")
    return convert(model, {t.name: pack(rtn(t.weight_OI(model), None, grid)) for t in targets(model)})


def fingerprint_of(model) -> str:
    """What cached log-probabilities are known by: the digest of the float model's weights."""
    from polybit.hub.workspace import model_digest

    return model_digest(model)


def scores_name(number: int) -> str:
    """File of the reference's scores of a shard."""
    return f"scores-{number:05d}.safetensors"


def make(model: str, config: PairsConfig) -> dict[str, Any]:
    """Everything between the flags and the finished directory; returns what was counted."""
    from polybit.hub.directory import check_output, output_lock, staged_directory
    from polybit.hub.workspace import Workspace

    check_output(config.out, overwrite=config.overwrite)
    models = find_models(model, config)
    with output_lock(config.out):
        notes, shards = prepare_prompts(models, config)
        store = Workspace(config.out, notes, restart=config.restart)
        try:
            answer_shards(models, shards, store.path, config)
            numbers = {**notes, **recount(store.path)}
            with staged_directory(config.out, overwrite=config.overwrite) as stage:
                gather_files(store.path, stage, numbers)
            store.discard()
        finally:
            store.close()
    return numbers


def prepare_prompts(models: Models, config: PairsConfig) -> tuple[dict[str, Any], list[tuple[int, list[list[int]]]]]:
    """(what fixes the result, for the fingerprint; shards of token prompts)."""
    import hashlib
    import json

    from polybit.data.chat import encode_prompt
    from polybit.data.prompts import gather_prompts
    from polybit.data.text import has_chat_template
    from polybit.hub.lm import longest_input
    from polybit.hub.load import load_float
    from polybit.train.pairs import sift

    float_model, tokenizer = load_float(models.float_name, trust_remote_code=models.trust_remote_code)
    chat = has_chat_template(tokenizer)
    gathered = gather_prompts(config.prompts, chat=chat, limit=config.limit)
    if not chat and any(not isinstance(prompt, str) for prompt in gathered):
        warn("the tokenizer has no chat template, so conversations are given as their lines")
    longest = longest_input(float_model)
    room = None if longest is None else longest - config.max_tokens
    if room is not None and room < 1:
        raise PolybitError(
            f"--max-tokens {config.max_tokens} leaves no room for a prompt: the model reads {longest} tokens"
        )
    sifted = sift((encode_prompt(tokenizer, prompt) for prompt in gathered if not is_blank(prompt)), room=room)
    blank = sum(is_blank(prompt) for prompt in gathered)
    if not sifted.prompts:
        raise PolybitError(
            f"none of the {len(gathered)} prompts of {config.prompts!r} can be answered ({blank} are empty, "
            f"{sifted.too_long} longer than {room} tokens): give others, or a smaller --max-tokens"
        )
    digest = hashlib.sha256(json.dumps(sifted.prompts).encode()).hexdigest()
    notes = {
        "reference": fingerprint_of(float_model),
        "float_model": models.float_name,
        "checkpoint": models.checkpoint,
        "checkpoint_digest": checkpoint_digest(models.checkpoint),
        "precision": models.precision,
        "group_size": models.group_size,
        "max_tokens": config.max_tokens,
        "top": config.top,
        "shard": config.shard,
        "prompts_digest": digest,
        "empty": sifted.empty + blank,
        "duplicate": sifted.duplicate,
        "too_long": sifted.too_long,
    }
    cuts = range(0, len(sifted.prompts), config.shard)
    return notes, [(number, sifted.prompts[cut : cut + config.shard]) for number, cut in enumerate(cuts)]


def is_blank(prompt: Any) -> bool:
    """A prompt in which nobody says anything."""
    return not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()


def checkpoint_digest(checkpoint: str | None) -> str | None:
    """Digest of a checkpoint's manifest, which names the digests of its files."""
    from polybit.core.runtime import sha256_file
    from polybit.hub.directory import MANIFEST

    manifest = Path(checkpoint or "") / MANIFEST
    return sha256_file(manifest) if checkpoint and manifest.is_file() else None


def answer_shards(models: Models, shards: list[Any], directory: Path, config: PairsConfig) -> None:
    """Make the shards that are not there yet."""
    from polybit.hub.workers import spread
    from polybit.train.pairs import shard_name

    missing = [task for task in shards if not (directory / shard_name(task[0])).is_file()]
    if not missing:
        return
    arguments = (models, directory, config.max_tokens, config.top, config.device)
    results = spread(PairMaker, arguments, missing, workers=config.workers, ray=config.ray)
    for _ in track(results, "shards of prompts", len(shards), done=len(shards) - len(missing)):
        pass


def recount(directory: Path) -> dict[str, Any]:
    """Counts over all shards."""
    from polybit.train.pairs import SHARDS, count, read_shard

    return count(pair for path in sorted(directory.glob(SHARDS)) for pair in read_shard(path))


def gather_files(source: Path, stage: Path, numbers: Mapping[str, Any]) -> None:
    """Link the finished shards into the directory that is to appear, and say what they are."""
    import os
    import shutil

    from polybit.core.runtime import write_json
    from polybit.train.pairs import SUMMARY

    for path in sorted([*source.glob("shard-*.jsonl"), *source.glob("scores-*.safetensors")]):
        try:
            os.link(path, stage / path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, stage / path.name)
    write_json(stage / SUMMARY, dict(numbers))


def read_material(directory: Path, *, reference: str, pad_token: int):
    """Pairs with their scores for training; scores of another float model are refused."""
    from polybit.train.material import PairMaterial, read_cache
    from polybit.train.pairs import SHARDS, read_shard, summary

    summary(directory)
    whole = PairMaterial([], [], {"": []}, pad_token)
    for number, path in enumerate(sorted(directory.glob(SHARDS))):
        part = read_cache(directory / scores_name(number), list(read_shard(path)), reference=reference)
        whole.prompts += part.prompts
        whole.chosen += part.chosen
        whole.rejected[""] += part.rejected.get("", [None] * len(part))
    return whole


def warn(sentence: str) -> None:
    """One line on stderr."""
    print(f"polybit: warning: {sentence}", file=sys.stderr)
