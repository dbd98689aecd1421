"""`polybit mix`: which mixture of texts to calibrate on, from one forward pass per text; and is that true?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.core.precision import check_width
from polybit.core.runtime import PolybitError
from polybit.hub.models import resolve

Files = Annotated[list[str], Parameter(consume_multiple=True)]
CRITERIA = ("family", "literal", "aligned-diverse", "rank-kept")
VERIFY_STEP = {2: 0.25, 3: 0.5}  # distance of the mixtures that are quantized; 1 beyond, the sources by themselves
HELD_OUT = 24  # windows of each text to measure on
DRAWS = 4  # --verify reads this many times the windows it calibrates on, so that every seed draws others


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Flags of `polybit mix`."""

    general: Files
    """General text: .txt or .jsonl files, named sets or dataset ids."""
    tasks: Files
    """Text of the tasks that matter: .txt or .jsonl files, named sets or dataset ids."""
    criterion: Literal["family", "literal", "aligned-diverse", "rank-kept"] = "family"
    """What makes a mixture good: family = like all held-out texts, literal = like the tasks (always pure task text,
    there to compare), aligned-diverse and rank-kept = like the tasks without losing rank."""
    normalise: Literal["size", "layer"] = "size"
    """How layers are made comparable; layer = every layer counts alike, for models with massive activations."""
    step: float | None = None
    """Distance of neighbouring shares (default: 0.05 for two texts, 0.1 for three or four)."""
    samples: int = 64
    """Windows of each text to look at, and of calibration text with --verify."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    verify: bool = False
    """Quantize at a few mixtures, measure every text, and say what the forward-only choice is worth."""
    bits: int = 3
    """Width of --verify."""
    method: Literal["gptq", "awq", "rtn", "rounding"] = "gptq"
    """Quantizer of --verify."""
    group_size: int = 32
    """Weights that share a scale, for --verify."""
    seeds: int = 3
    """Calibration draws of --verify."""
    seed: int = 0
    """First seed."""
    restart: bool = False
    """Forget what an interrupted --verify has finished."""
    json: Path | None = None
    """Write the search, and the measured table, there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def mix(model: str, /, *, config: Annotated[MixConfig, Parameter(name="*")]) -> None:
    """Find the mixture of texts MODEL (a local path, a hub id, or tinychat) is best calibrated on.

    The result is what `polybit quantize --mix FILE=SHARE,FILE=SHARE` takes.
    """
    check(config)
    from polybit.core.records import Run

    run = Run("mix", {"model": model, **asdict(config), "json": str(config.json or "")})
    with run.timed():
        run.numbers = search(model, config)
    if config.json is not None:
        run.write(config.json)
    print_result(model, config, run.numbers)


def check(config: MixConfig) -> None:
    """Refuse flags that make no sense before anything is loaded."""
    check_width("w", config.bits)
    names = [*config.general, *config.tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PolybitError(f"text {twice[0]!r} is given twice: name each text once, as general or as a task")
    for flag, value in (("samples", config.samples), ("seeds", config.seeds)):
        if value < 1:
            raise PolybitError(f"--{flag} {value} is not possible: give 1 or more")


def search(name: str, config: MixConfig) -> dict[str, Any]:
    """Load, read the texts, search, and verify when asked."""
    from polybit.hub.load import load_float
    from polybit.measure.mixture import search_mixtures
    from polybit.nn.convert import targets

    model, tokenizer = load_float(resolve(name), trust_remote_code=config.trust_remote_code)
    chosen = targets(model)
    texts = read_texts(model, tokenizer, [*config.general, *config.tasks], config)
    cut = {text: list(windows[: config.samples].split(4)) for text, (windows, _) in texts.items()}
    family = {text: list(held_out.split(4)) for text, (_, held_out) in texts.items()}
    asked: Sequence[Any] = CRITERIA if config.verify else (config.criterion,)
    found = search_mixtures(
        model,
        cut,
        chosen,
        general=config.general,
        criteria=asked,
        normalise=config.normalise,
        family=family,
        step=config.step,
    )
    numbers: dict[str, Any] = {"mixture": found[config.criterion].to_json()}
    if config.verify:
        numbers["others"] = {c: m.to_json()["best"] for c, m in found.items() if c != config.criterion}
        numbers["curves"] = {criterion: m.to_json()["curve"] for criterion, m in found.items()}
        picks: dict[str, tuple[float, ...]] = {criterion: m.best.weights for criterion, m in found.items()}
        numbers["verified"] = verify(name, model, chosen, texts, picks, config)
    return numbers


def read_texts(model, tokenizer, sources: Sequence[str], config: MixConfig) -> dict[str, tuple[Any, Any]]:
    """Source -> windows to calibrate on and windows to measure on, [N, T] each, all of one length."""
    from polybit.compress.mix_files import about
    from polybit.compress.text import gather, window_length

    length = window_length(model, config.window)
    samples = config.samples * (DRAWS if config.verify else 1)
    texts = {}
    for source in sources:
        with about(source):
            part = gather(model, tokenizer, source, samples=samples, length=length, seed=config.seed, held_out=HELD_OUT)
        texts[source] = part.windows_NT, part.held_out_MT
    return texts


def verify(
    name: str,
    model,
    chosen: Sequence[Any],
    texts: Mapping[str, tuple[Any, Any]],
    picks: Mapping[str, tuple[float, ...]],
    config: MixConfig,
) -> dict[str, Any]:
    """Quantize at a coarse grid and at every criterion's pick; the measured table and the regrets."""
    from polybit.core.journal import Journal
    from polybit.hub.workspace import model_digest
    from polybit.measure.mixture import simplex
    from polybit.measure.mixture_truth import judge, measure_mixtures

    windows = {source: cut for source, (cut, _) in texts.items()}
    held_out = {source: kept for source, (_, kept) in texts.items()}
    shortest = min(len(cut) for cut in windows.values())
    samples = min(config.samples, max(1, shortest // 2))
    if samples < config.samples:
        print(
            f"polybit: warning: --verify calibrates on {samples} windows: the shortest text gives {shortest}, "
            "and every seed must draw others",
            file=sys.stderr,
        )
    grid = [tuple(row) for row in simplex(len(windows), VERIFY_STEP.get(len(windows), 1.0)).tolist()]
    points = [*grid, *(point for point in dict.fromkeys(picks.values()) if point not in grid)]
    fingerprint = {
        k: v for k, v in asdict(config).items() if k not in ("json", "restart", "seeds", "criterion", "step")
    }
    fingerprint |= {"model": model_digest(model), "samples": samples}
    base = config.json or Path(f"mix-{Path(name).name}.json")
    journal = Journal(base.with_name(f"{base.name}.partial"), fingerprint, restart=config.restart)
    found = measure_mixtures(
        model,
        chosen,
        windows,
        held_out,
        points,
        quantizer(model, chosen, config),
        samples=samples,
        seeds=range(config.seed, config.seed + config.seeds),
        keep=journal.put,
        kept=journal.done,
    )
    result = judge(list(windows), found, picks)
    journal.remove()
    return result


def quantizer(model, chosen: Sequence[Any], config: MixConfig):
    """(windows, seed) -> dequantized weights by layer, as `polybit quantize` would make them."""
    from polybit.compress.loop import Nowhere, compress
    from polybit.compress.recipe import choose
    from polybit.compress.text import BATCH, batches

    recipe = choose(
        config.method, (config.bits,), config.group_size, asymmetric=None, effort="normal", seed=config.seed
    )

    def quantize(windows_NT, seed: int) -> dict[str, Any]:
        parts = compress(model, chosen, batches(windows_NT, BATCH), replace(recipe, seed=seed), Nowhere())
        return {key: q.dequantize() for part in parts for key, q in part.items()}

    return quantize


def print_result(name: str, config: MixConfig, numbers: Mapping[str, Any]) -> None:
    """The chosen mixture, the measured table, and what to type next."""
    mixture = numbers["mixture"]
    best = mixture["best"]["weights"]
    share = ", ".join(f"{100 * weight:.0f} % {source}" for source, weight in best.items())
    print(f"{mixture['criterion']}: {share} (alignment {mixture['best']['alignment']:.4f})")
    if "verified" in numbers:
        print_verified(numbers["verified"])
    spec = ",".join(f"{source}={weight:g}" for source, weight in best.items() if weight > 0)
    print(f"Next: polybit quantize {name} --out OUT --bits {config.bits} --mix {spec}")


def print_verified(verified: Mapping[str, Any]) -> None:
    """Measured KL per mixture and text, and the regret of every criterion."""
    from polybit.report.tables import aligned, estimate, percent

    texts = list(verified["worst_kl"]["best"])
    rows = [
        [
            " + ".join(f"{weight:.2f}" for weight in row["weights"].values()),
            *(estimate(row["kl"][text]) for text in texts),
            estimate(row["worst_kl"]),
            estimate(row["worst_share"], percent),
        ]
        for row in verified["points"]
    ]
    print(aligned(["shares", *(f"KL {Path(text).name}" for text in texts), "worst KL", "worst rise"], rows))
    print(
        "Worst rise: of the text that loses most against its own best mixture. Regret: the choice less the best point."
    )
    for criterion in verified["worst_kl"]["regret"]:
        plain, share = verified["worst_kl"], verified["worst_share"]
        print(
            f"regret of {criterion}: {estimate(plain['regret'][criterion])} nats per token "
            f"(noise {plain['noise']:.4f}); "
            f"{estimate(share['regret'][criterion], percent)} (noise {percent(share['noise'])})"
        )
