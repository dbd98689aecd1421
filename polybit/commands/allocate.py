"""`polybit allocate`: how many bits each layer deserves under a budget, and whether that beats spending them evenly."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.core.precision import check_width, parse_widths
from polybit.core.runtime import PolybitError
from polybit.hub.models import EMBEDDED, resolve

Texts = Annotated[list[str], Parameter(consume_multiple=True)]
HELD_OUT = 16  # windows, and items of each task, that are kept for the proof
FRONT = 12  # budgets of the front of loss against bits


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """Flags of `polybit allocate`."""

    bits: float
    """Budget: effective bits per weight of the quantized layers, scales and zero points counted, as in 3.5."""
    out: Path = Path("plan.json")
    """The plan, for polybit quantize --plan."""
    tasks: Texts | None = None
    """Tasks that matter: .jsonl, .json or .csv files of questions with answers (GSM8K, SQuAD, chat messages), or
    reading, arithmetic, dialogue, gsm8k, squad (default: the embedded ones for tinychat, otherwise none)."""
    general: Texts | None = None
    """General text: .txt or .jsonl files, named sets, dataset ids, or self (default: as polybit quantize does)."""
    beta: float = 0.7
    """Weight of the tasks against the general text, 0 to 1."""
    widths: str = "2,3,4,5,6"
    """Widths a layer may have, with commas."""
    group_size: int = 64
    """Weights that share a scale: 16, 32, 64, 128, 256, or 0 = a whole row."""
    asymmetric: bool = False
    """Count and use a zero point per group."""
    sensitivity: Literal["exact", "gradient"] = "exact"
    """exact = quantize each layer alone and read the loss; gradient = estimate from backward passes, cheaper."""
    method: Literal["gptq", "rtn", "hqq", "awq"] = "gptq"
    """Quantizer of the sensitivities; gptq ranks as the finished file does, rtn is faster."""
    signal: Literal["kl", "nll"] = "kl"
    """What counts as harm: divergence from the float model, or the rise of the loss on the text itself (noisier)."""
    free_groups: bool = False
    """Let layers that engines fuse (q/k/v, gate/up, w1/w3) have widths of their own."""
    pin: Texts | None = None
    """Layers with a fixed width: PATTERN=WIDTH, as in '*.down_proj=4'."""
    refine: int = 0
    """Whole plans to measure while improving the solution by exchanges, as in 60; for files without learned rounding
    (--effort fast), which makes up for what the exchanges mend."""
    samples: int = 32
    """Windows of each general text to read sensitivities on."""
    items: int = 64
    """Questions of each task to read sensitivities on."""
    calibration_samples: int = 128
    """Windows of general text the quantizer calibrates on."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    workers: int = 1
    """Processes to share the measuring; each holds the model."""
    cache: Path | None = None
    """Where measured sensitivities are kept for later budgets (default: ~/.cache/polybit/sensitivity)."""
    mix: Path | None = None
    """What polybit mix --json wrote, to show its curve on the page."""
    report: Path | None = None
    """Write a page: bit map, sensitivities, front of loss against bits."""
    json: Path | None = None
    """Write all numbers there."""
    seed: int = 0
    """Seed of everything that is drawn."""
    restart: bool = False
    """Measure again instead of using what an earlier run kept."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def allocate(model: str, /, *, config: Annotated[AllocateConfig, Parameter(name="*")]) -> None:
    """Spend --bits per weight on the layers of MODEL where the tasks and the general text need them.

    Writes a plan for polybit quantize --plan. Sensitivities are measured once and kept for every later budget;
    interrupted runs go on where they stopped.
    """
    widths = check(config)
    from polybit.commands.allocation import build
    from polybit.core.records import Run
    from polybit.core.runtime import write_json

    run = Run("allocate", {"model": model, **{k: plain(v) for k, v in asdict(config).items()}})
    with run.timed():
        document, run.numbers = build(model, config, widths)
    write_json(config.out, document)
    if config.json is not None:
        run.write(config.json)
    print_result(model, config, run.numbers)
    if config.report is not None:
        write_page(config, run.to_json())


def plain(value: Any) -> Any:
    """A flag's value for JSON."""
    return str(value) if isinstance(value, Path) else value


def check(config: AllocateConfig) -> tuple[int, ...]:
    """Refuse flags that make no sense before anything is loaded; returns the widths, narrowest first."""
    from polybit.core.affine import Grid

    widths = tuple(sorted(parse_widths(config.widths)))
    Grid(widths[0], config.group_size)
    if not math.isfinite(config.bits) or config.bits <= 0:
        raise PolybitError(f"--bits {config.bits} is not possible: give bits per weight such as 3.5")
    if not 0 <= config.beta <= 1:
        raise PolybitError(f"--beta {config.beta} is not possible: give 0 (general text only) to 1 (tasks only)")
    for flag, value, least in (
        ("samples", config.samples, 1),
        ("items", config.items, 1),
        ("calibration-samples", config.calibration_samples, 1),
        ("workers", config.workers, 1),
        ("refine", config.refine, 0),
    ):
        if value < least:
            raise PolybitError(f"--{flag} {value} is not possible: give {least} or more")
    for pin in config.pin or ():
        read_pin(pin)
    for flag, path in (("out", config.out), ("report", config.report)):
        if path is not None and path.is_dir():
            raise PolybitError(f"--{flag} {path} is a directory: give the name of a file")
    if config.report is not None:
        from polybit.report.plots import figure

        figure()  # a missing library is said before the work, not after it
    return widths


def read_pin(pin: str) -> tuple[str, int]:
    """`*.down_proj=4` as (pattern, width)."""
    pattern, sign, width = pin.rpartition("=")
    if not sign or not pattern or not width.isdigit():
        raise PolybitError(f"--pin {pin!r} cannot be read: write PATTERN=WIDTH, as in '*.down_proj=4'")
    return pattern, check_width("w", int(width))


def pinned(pins: Sequence[str], names: Sequence[str], widths: Sequence[int]) -> dict[str, int]:
    """Layer -> the width it must have."""
    found: dict[str, int] = {}
    for pattern, width in map(read_pin, pins):
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise PolybitError(f"--pin {pattern}={width} matches no layer; layers are named like {names[0]!r}")
        if width not in widths:
            raise PolybitError(
                f"--pin {pattern}={width} is none of the widths {', '.join(map(str, widths))}: add it to --widths"
            )
        for name in matching:
            if found.setdefault(name, width) != width:
                raise PolybitError(f"layer {name!r} is pinned to {found[name]} and to {width} bits: keep one --pin")
    return found


def print_result(name: str, config: AllocateConfig, numbers: Mapping[str, Any]) -> None:
    """The plan in a few lines, its proof, and what to type next."""
    from polybit.report.tables import aligned, estimate, number

    plan, proof = numbers["plan"], numbers["proof"]
    counts = ", ".join(f"{count} at {width}" for width, count in sorted(numbers["layers_by_width"].items()))
    print(f"{config.out}: {numbers['bits_per_weight']:.3f} effective bits per weight; layers: {counts} bits")
    for label, agreement in numbers["agreement"].items():
        halves = ", ".join(f"{k} {'' if v is None else f'{v:.2f}'}" for k, v in agreement["reliability"].items())
        print(f"Kendall's tau {label}: {estimate(agreement['tau'])} (each with itself, by halves: {halves})")
    rows = [
        [row["name"], f"{row['bits']:.3f}", *(number(kl["value"]) for kl in row["kl"].values()), number(row["score"])]
        for row in proof["rows"]
    ]
    probes = list(proof["rows"][0]["kl"])
    print(aligned(["on held-out text", "bits/weight", *(f"KL {p}" for p in probes), "weighted"], rows))
    if not proof["better_than_uniform"]:
        print(
            "polybit: warning: this plan is NOT better than spending the bits evenly "
            f"({number(proof['score'])} against {number(proof['uniform_score'])}): use a uniform width, or read the "
            "sensitivities on more text (--samples, --items)",
            file=sys.stderr,
        )
    assert plan["layers"]
    zero = " --asymmetric" if config.asymmetric else ""
    print(f"Next: polybit quantize {name} --out OUT --plan {config.out} --group-size {config.group_size}{zero}")


def write_page(config: AllocateConfig, run: Mapping[str, Any]) -> None:
    """The report page, with the mixture's curve where one was given."""
    from polybit.commands.report import read_run
    from polybit.core.runtime import atomic_path
    from polybit.report.allocation import page

    text = page(run, read_run(config.mix, "mix") if config.mix is not None else None)
    assert config.report is not None
    with atomic_path(config.report) as staged:
        staged.write_text(text, encoding="utf-8")
    print(f"Page: {config.report}")


def is_embedded(name: str) -> bool:
    """Whether a MODEL argument means the embedded model."""
    return Path(resolve(name)).resolve() == Path(resolve(EMBEDDED)).resolve()
