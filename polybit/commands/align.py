"""`polybit align`: teach a quantized model to answer as its float self, and save a checkpoint of the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.commands.align_widths import Widths, choose, make, precision_names, settle, statistics
from polybit.commands.aligned import describe, print_result
from polybit.commands.pairs import Models, PairsConfig, find_models, fingerprint_of, read_material
from polybit.core.runtime import PolybitError
from polybit.hub.models import device_of

Method = Literal["kd", "kd-own", "flip", "qdpo", "qdpo+kd", "kd-then-qdpo"]
RATES: dict[str, float] = {
    "kd": 3e-4,
    "kd-own": 3e-4,
    "flip": 3e-4,
    "qdpo": 1e-4,
    "qdpo+kd": 1e-4,
    "kd-then-qdpo": 1e-4,
}
STATIC_RATE = 1e-5  # of QDPO without refresh: above it likelihood displacement begins (docs/results.md)
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 128
RENEWALS = 10  # in a run, unless --refresh-every says otherwise


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Flags of `polybit align`."""

    out: Path
    """Directory of the new checkpoint."""
    pairs: Path | None = None
    """Directory made by `polybit pairs`."""
    prompts: str | None = None
    """Instead of --pairs: prompts to make pairs of first (file, named set or dataset id)."""
    precision: str | None = None
    """Precisions to align, with commas, as in w3 or w4,w3,w2 (default: a checkpoint's widths of 4 bits and less, that
    of the pairs for a float model). All other widths of a checkpoint are kept."""
    keep_within: float = 0.005
    """Nats of KL a width that is kept may lose, or 5 % of what it has where that is more; of several aligned ones also
    those that begin within it."""
    latents: Literal["own", "shared"] = "own"
    """Of several widths in one file: own = each moves only the bits that narrower ones do not read; shared = one latent
    weight for all."""
    method: Method = "kd"
    """kd = forward KL on the float model's answers; kd-own = reverse KL on the model's own; flip = kd that looks at
    flips; qdpo = preference of the float answer; qdpo+kd, kd-then-qdpo = both, at once or one after the other."""
    steps: int = 150
    """Gradient steps; several widths of one file take them in turn."""
    batch: int = 16
    """Prompts per step."""
    accumulate: int = 1
    """Parts a step's batch is cut into, for memory."""
    learning_rate: float | None = None
    """Peak learning rate (default: 3e-4 for kd, 1e-4 for qdpo with refresh, 1e-5 without)."""
    beta: float = 0.1
    """Inverse temperature of qdpo."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Preference loss."""
    nll: float = 0.0
    """Weight of the negative log-likelihood of the float answers in qdpo."""
    gamma: float = 10.0
    """Weight of kd in qdpo+kd."""
    refresh_every: int | None = None
    """Steps after which the model's own answers are made anew (default: a tenth of the steps; 0 = never, as
    published)."""
    share: Literal["sum", "loss", "gradient", "project"] = "loss"
    """How several widths share the weights: sum of losses, each loss over its start, equal gradients, or without what
    works against another."""
    adapter: Literal["none", "nested"] = "none"
    """nested = train low-rank updates inside the quantizer, Q(W + BA), instead of the weights."""
    rank: int = 16
    """Rank of the adapter."""
    scales: Literal["recomputed", "learned", "frozen"] | None = None
    """Scales of the grid (default: recomputed from the weights for a float model, learned from a checkpoint)."""
    group_size: int = 64
    """Weights that share a scale, where MODEL is a float model."""
    held_out: int | None = None
    """Prompts kept for choosing the best moment (default: a tenth, at most 128)."""
    probes: int = 10
    """How often held-out flips and KL are measured."""
    max_tokens: int = 256
    """Longest answer, with --prompts."""
    shared_prefix: bool = False
    """Compute the common beginning of a pair once (qdpo; pays for long prompts)."""
    reference: str | None = None
    """The float model of a polybit checkpoint (default: the one it says it was made from)."""
    workers: int = 1
    """Processes that make pairs, with --prompts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train (auto: a GPU where there is one)."""
    seed: int = 0
    """Seed of the order of prompts."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""
    json: Path | None = None
    """Write the run with all its numbers there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def align(model: str, /, *, config: Annotated[AlignConfig, Parameter(name="*")]) -> None:
    """Train MODEL (a float model or a polybit checkpoint) at --precision to answer as its float self.

    The result is a normal checkpoint with the bytes and the speed of one that was never trained. The moment of the run
    with the fewest held-out flips and the smallest KL is kept, the start if nothing beats it.
    """
    check(config)
    from polybit.core.records import Run

    run = Run("align", {"model": model, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}})
    with run.timed():
        run.numbers = build(model, config, run)
    if config.json is not None:
        run.write(config.json)
    print_result(config.out, run.numbers)


def check(config: AlignConfig) -> None:
    """Refuse flags that contradict each other before anything is loaded."""
    if (config.pairs is None) == (config.prompts is None):
        raise PolybitError("give --pairs DIR (made by polybit pairs) or --prompts FILE, one of the two")
    for flag in ("steps", "batch", "accumulate", "probes", "max_tokens", "rank", "workers"):
        if getattr(config, flag) < 1:
            raise PolybitError(f"--{flag.replace('_', '-')} {getattr(config, flag)} is not possible: give 1 or more")
    if config.batch % config.accumulate:
        raise PolybitError(f"--accumulate {config.accumulate} does not divide --batch {config.batch}: choose a divisor")
    if config.shared_prefix and config.method != "qdpo":
        raise PolybitError(f"--shared-prefix belongs to --method qdpo, not to {config.method}: leave it out")
    if config.refresh_every is not None and config.refresh_every < 0:
        raise PolybitError(
            f"--refresh-every {config.refresh_every} is not possible: give 0 (never) or a number of steps"
        )


def refresh_of(config: AlignConfig) -> int:
    """Steps between renewals; 0 where the method never looks at the model's own answers."""
    if config.method in ("kd", "flip"):
        return 0
    if config.refresh_every is None:
        return max(1, config.steps // RENEWALS)
    return config.refresh_every


def rate_of(config: AlignConfig) -> float:
    """The learning rate asked for, or the method's own."""
    if config.learning_rate is not None:
        return config.learning_rate
    return STATIC_RATE if config.method == "qdpo" and not refresh_of(config) else RATES[config.method]


def objective_of(config: AlignConfig):
    """The objective a method means."""
    from polybit.train.table import ANSWER_OBJECTIVES, AnswerKnobs

    knobs = AnswerKnobs(
        beta=config.beta,
        loss=config.loss,
        nll=config.nll,
        gamma=config.gamma,
        shared_prefix=config.shared_prefix,
        steps=config.steps,
    )
    return ANSWER_OBJECTIVES[config.method].build(knobs)


def build(name: str, config: AlignConfig, run) -> dict[str, Any]:
    """Pairs, training, freezing, saving; returns the numbers of the run."""
    from polybit.hub.checkpoint import save, verify
    from polybit.hub.directory import check_output, output_lock
    from polybit.hub.load import load_float
    from polybit.hub.workspace import Workspace
    from polybit.nn.rotation import rotate
    from polybit.train import align as course_of
    from polybit.train.latent import freeze
    from polybit.train.pairs import summary
    from polybit.train.schedules import every, in_turn

    check_output(config.out, overwrite=config.overwrite)
    objective = objective_of(config)
    models = find_models(name, replace_precision(config))
    with output_lock(config.out):
        pairs = config.pairs or make_pairs(name, config)
        model, tokenizer = load_float(models.float_name, trust_remote_code=config.trust_remote_code)
        widths = choose(config, models, summary(pairs))
        digest = fingerprint_of(model)
        if models.rotation is not None:
            rotate(model, models.rotation)  # it says the same, in the basis of the codes
        store = Workspace(config.out, fingerprint(config, models, digest, widths.presets), restart=config.restart)
        try:
            material = read_material(pairs, reference=digest, pad_token=tokenizer.pad_token_id or 0)
            count = config.held_out or max(1, min(HELD_OUT_MOST, int(len(material) * HELD_OUT_SHARE)))
            material, held_out = material.split(count)
            stats = statistics(
                model, widths, [[*p, *a.tokens] for p, a in zip(material.prompts, material.chosen, strict=True)]
            )
            trainable = make(model, models, widths, config).to(device_of(config.device))
            outcome = course_of.run(
                trainable,
                (material, held_out),
                objective,
                widths.trained,
                out=store.path / "run",
                course=course(config, widths),
                schedule=in_turn if widths.chained else every,
                refresh=course_of.Refresh(tokenizer, refresh_of(config), int(summary(pairs)["max_tokens"])),
            )
            settled = settle(trainable, widths, stats, held_out, outcome)
            frozen = freeze(trainable.cpu(), widths.trained[0] if config.adapter == "nested" else None)
            numbers = describe(outcome, frozen, len(material), len(held_out), settled)
            notes = {"base_model": parent_name(name, models), "aligned": summary_of(config, outcome)}
            stored = tuple(sorted({plan.default.w for plan in widths.presets.values()}, reverse=True))
            set_plain_presets(frozen, widths.presets)
            saved = save(
                frozen, config.out, tokenizer=tokenizer, widths=stored, notes=notes, overwrite=config.overwrite
            )
            verify(saved, frozen)
            store.discard()
        finally:
            store.close()
    return numbers


def replace_precision(config: AlignConfig) -> Any:
    """The configuration as `find_models` reads it: one precision, the narrowest."""
    names = precision_names(config.precision)
    return replace(config, precision=names[-1] if names else None)


def make_pairs(name: str, config: AlignConfig) -> Path:
    """Pairs of --prompts, beside the output, kept until the checkpoint is complete and taken over by a later run."""
    from polybit.commands import pairs as pairs_of
    from polybit.train.pairs import SUMMARY, summary

    names = precision_names(config.precision)
    directory = config.out.with_name(f"{config.out.name}.pairs")
    assert config.prompts is not None
    wanted = PairsConfig(
        prompts=config.prompts,
        out=directory,
        precision=names[-1] if names else None,
        reference=config.reference,
        group_size=config.group_size,
        max_tokens=config.max_tokens,
        workers=config.workers,
        device=config.device,
        restart=config.restart,
        trust_remote_code=config.trust_remote_code,
    )
    if (directory / SUMMARY).is_file():
        noted = summary(directory)
        asked, _ = pairs_of.prepare_prompts(find_models(name, wanted), wanted)
        if any(noted.get(key) != value for key, value in asked.items()):
            wanted = replace(wanted, overwrite=True)
            pairs_of.make(name, wanted)
    else:
        pairs_of.make(name, wanted)
    return directory


def course(config: AlignConfig, widths: Widths):
    """The course of the run."""
    from polybit.train.balance import Balance
    from polybit.train.fit import Course

    return Course(
        steps=config.steps,
        batch=config.batch,
        accumulate=config.accumulate,
        learning_rate=rate_of(config),
        probes=config.probes,
        balance=Balance(config.share),
        seed=config.seed,
        allowed=widths.allowed(config.keep_within),
        exact=config.keep_within if len(widths.trained) > 1 else 0.0,
    )


def fingerprint(config: AlignConfig, models: Models, digest: str, presets: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the result of a run, so that a resumed one cannot mix two."""
    kept = asdict(config)
    for key in ("out", "json", "overwrite", "restart", "workers", "device", "trust_remote_code"):
        del kept[key]
    return {
        **{key: str(value) if isinstance(value, Path) else value for key, value in kept.items()},
        "reference": digest,
        "checkpoint": models.checkpoint,
        "presets": list(presets),
    }


def parent_name(name: str, models: Models) -> str:
    """The float model as the user named it, tinychat by its own name."""
    from polybit.hub.models import EMBEDDED, resolve

    parent = name if models.checkpoint is None else models.float_name
    return EMBEDDED if Path(resolve(parent)) == Path(resolve(EMBEDDED)) else parent


def set_plain_presets(model, presets: Mapping[str, Any]) -> None:
    """Plain widths are presets every checkpoint has; only other names are stored."""
    from polybit.core.precision import Precision
    from polybit.nn.switch import set_presets

    plain = {name for name in presets if str(Precision.parse(name)) == name}
    set_presets(model, {name: plan for name, plan in presets.items() if name not in plain})


def summary_of(config: AlignConfig, outcome) -> dict[str, Any]:
    """What a checkpoint says about its alignment."""
    return {
        "method": config.method,
        "steps": config.steps,
        "learning_rate": rate_of(config),
        "refresh_every": refresh_of(config),
        "kept": outcome.picker.reason(),
    }
