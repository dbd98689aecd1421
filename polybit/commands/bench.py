"""`polybit bench`: how fast this machine runs every width, beside what else can run the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.core.precision import parse_widths
from polybit.core.runtime import PolybitError, atomic_path
from polybit.hub.models import resolve

GGUF_TYPES = ("Q8_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Flags of `polybit bench`."""

    widths: str = "8,6,5,4,3,2"
    """Widths to time, with commas."""
    threads: int | None = None
    """Threads (default: those torch takes)."""
    rounds: int = 30
    """Interleaved rounds; medians and ratios are over them."""
    peers: bool = True
    """Time torch's kernels and, where llama_cpp can be imported, llama.cpp too."""
    shape: str = "4096x4096"
    """linear: rows x columns of the matrix."""
    batch: int = 1
    """linear: tokens multiplied at once (128 = reading a prompt)."""
    arithmetic: str = "int16,int8"
    """How inputs are rounded, with commas: int16 (error below 1e-4) and int8 (as llama.cpp does)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """linear: where to run."""
    tokens: int = 16
    """generate: tokens written each time."""
    prompt: int = 64
    """generate: tokens of the prompt that is read."""
    float_model: str | None = None
    """generate: the float model to compare with, run in bf16 (default: a random one of the same sizes)."""
    gguf: str | None = None
    """generate: GGUF files for llama.cpp, with commas (default for the random model: files of the same sizes)."""
    hidden: int = 1280
    """Hidden size of the random model."""
    layers: int = 24
    """Blocks of the random model."""
    intermediate: int = 3584
    """Inner size of the random model's blocks."""
    vocabulary: int = 32000
    """Tokens the random model knows."""
    heads: int = 20
    """Attention heads of the random model."""
    kv_heads: int = 4
    """Key and value heads of the random model."""
    ends: int = 8
    """Bits of the random model's embedding and output head; 0 = those of its blocks, and llama.cpp's files then hold
    one type throughout."""
    chart: Path | None = None
    """Write the figure there (SVG)."""
    json: Path | None = None
    """Write every number there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def bench(
    what: Literal["linear", "generate", "switch"],
    model: str | None = None,
    /,
    *,
    config: Annotated[BenchConfig, Parameter(name="*")] = BenchConfig(),
) -> None:
    """Measure speed: WHAT is linear (one product), generate (tokens per second), or switch (changing the width).

    MODEL is a polybit checkpoint; without one a random Llama of half a billion weights is timed. Everything runs in one
    interleaved run, because a shared machine's speed drifts: trust the ratios and shares before the absolute numbers.
    """
    check(what, model, config)
    import torch

    from polybit.core.records import Run

    threads = torch.get_num_threads()
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    run = Run("bench", {"what": what, "model": model, **asked})
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with run.timed(), torch.inference_mode():
            run.numbers = {"linear": linear, "generate": generate, "switch": switching}[what](model, config)
    finally:
        torch.set_num_threads(threads)
    show(what, run.numbers, config)
    if config.json is not None:
        run.write(config.json)


def check(what: str, model: str | None, config: BenchConfig) -> None:
    """Refuse flags that cannot be meant before anything is loaded."""
    for flag in ("threads", "rounds", "batch", "tokens", "prompt"):
        value = getattr(config, flag)
        if value is not None and value < 1:
            raise PolybitError(f"--{flag} {value} is not possible: give 1 or more")
    if what == "linear" and model is not None:
        raise PolybitError(f"bench linear times one random matrix, not {model!r}: use bench generate {model}")
    if config.device == "cuda" and what != "linear":
        raise PolybitError(f"--device cuda is for bench linear only, not for bench {what}: leave it out")
    if config.ends and not 2 <= config.ends <= 8:
        raise PolybitError(f"--ends {config.ends} is not possible: give 2 to 8 bits, or 0 for the width of the blocks")
    if max(parse_widths(config.widths)) > 8:
        raise PolybitError(f"--widths {config.widths} asks for more than 8 bits: choose from 8 down to 1")


def linear(_: str | None, config: BenchConfig) -> dict[str, Any]:
    """Every width of one product; keeps the machine's constants when one token is multiplied."""
    import torch

    from polybit.speed import products as speed
    from polybit.speed.timing import Probe, clock_for, int8_peak, summarize, time_rounds

    rows, columns = matrix(config.shape)
    modes = modes_of(config)
    widths = parse_widths(config.widths)
    if config.device == "cuda":
        from polybit.speed.products_gpu import time_on_gpu

        return time_on_gpu(rows, columns, config.batch, widths, modes, config.rounds, peers=config.peers)
    speed.verify()
    clock = clock_for(torch.get_num_threads())
    jobs = speed.polybit_jobs(rows, columns, config.batch, widths, modes)
    if config.peers:
        jobs += speed.torch_jobs(rows, columns, config.batch)
    probe = Probe(clock)
    peak = int8_peak(clock)
    found = time_rounds(jobs, config.rounds, probe, clock, "bench linear")
    peak = max(peak, int8_peak(clock))  # right after torch's products its threads may still be spinning
    table = with_ratios(summarize(jobs, found, peak), found)
    numbers: dict[str, Any] = {"rows": table, "int8_peak": peak, "threads": torch.get_num_threads()}
    if config.batch == 1:
        numbers |= keep_constants(table, widths, peak, speed.call_overhead(20, clock), modes[0])
    return numbers


def keep_constants(
    table: Sequence[Mapping[str, Any]], widths: Sequence[int], peak: float, call_seconds: float, mode: str
) -> dict[str, Any]:
    """Write the machine's constants; what is in the cache of half the width is not counted as bandwidth."""
    import torch

    from polybit.core.records import processor_name
    from polybit.speed.machine import Constants, keep, today

    by_name = {row["name"]: row for row in table}
    kept = [(b, by_name[f"polybit w{b} {mode}"]) for b in widths]
    efficiency = {b: round(row["paired_share"], 4) for b, row in kept}
    bandwidth = sorted(row["gigabytes_per_second"] * 1e9 / row["paired_share"] for _, row in kept)[len(kept) // 2]
    constants = Constants(
        processor_name(),
        torch.get_num_threads(),
        today(),
        bandwidth,
        efficiency,
        call_seconds,
        int8_peak=peak,
        notes={"arithmetic": mode},
    )
    return {"constants": asdict(constants), "constants_file": str(keep(constants))}


def generate(model: str | None, config: BenchConfig) -> dict[str, Any]:
    """Tokens per second of every width by the fast path and by transformers, against bf16 and llama.cpp."""
    import torch

    from polybit.speed import models as speed_model
    from polybit.speed.timing import Probe, clock_for, summarize, time_rounds

    presets = [f"w{b}" for b in parse_widths(config.widths)]
    modes = modes_of(config)
    loaded = open_quantized(model, config)
    prompt = torch.randint(0, loaded.config.get_text_config().vocab_size, (1, config.prompt))
    jobs = speed_model.polybit_jobs(loaded, presets, prompt=prompt, tokens=config.tokens, modes=modes)
    if config.peers:
        jobs += peers(model, config, prompt)
    clock = clock_for(torch.get_num_threads())
    found = time_rounds(jobs, config.rounds, Probe(clock), clock, "bench generate")
    return {"rows": with_ratios(summarize(jobs, found), found), "threads": torch.get_num_threads()}


def modes_of(config: BenchConfig) -> list[Literal["int16", "int8"]]:
    """The arithmetics, the accurate one first."""
    asked = config.arithmetic.split(",")
    modes: list[Literal["int16", "int8"]] = [mode for mode in ("int16", "int8") if mode in asked]
    if len(modes) != len(asked):
        raise PolybitError(f"--arithmetic {config.arithmetic} is not known: choose from int16, int8")
    return modes


def switching(model: str | None, config: BenchConfig) -> dict[str, Any]:
    """Time from one width to the next."""
    import time

    from polybit.speed.models import switch_seconds

    loaded = open_quantized(model, config)
    presets = [f"w{b}" for b in parse_widths(config.widths)]
    return switch_seconds(loaded, presets, config.rounds, time.perf_counter)


def open_quantized(model: str | None, config: BenchConfig) -> Any:
    """The polybit model to time."""
    if model is None:
        from polybit.compress.ends import end_targets, hold_ends
        from polybit.hub.random_model import random_quantized, skeleton

        made = random_quantized(random_shape(config))
        names = [target.name for target in end_targets(skeleton(random_shape(config)))] if config.ends else []
        hold_ends(made, names, config.ends, parse_widths(config.widths))
        return made
    from polybit.compress.sizes import quantized_layers
    from polybit.hub.load import load

    loaded, _ = load(resolve(model), trust_remote_code=config.trust_remote_code)
    if not quantized_layers(loaded):
        raise PolybitError(
            f"{model} is a float model: quantize it first, as in `polybit quantize {model} --out DIR`, "
            "or leave MODEL out to time a random one"
        )
    return loaded


def peers(model: str | None, config: BenchConfig, prompt: Any) -> list[Any]:
    """bf16 transformers, and llama.cpp where it can be imported."""
    import torch

    from polybit.speed import llama
    from polybit.speed import models as speed_model
    from polybit.speed.machine import cache_directory

    if config.float_model is not None:
        from polybit.hub.load import load_float

        floating, _ = load_float(
            resolve(config.float_model), dtype=torch.bfloat16, trust_remote_code=config.trust_remote_code
        )
        jobs = speed_model.float_jobs(floating, "bf16", prompt=prompt, tokens=config.tokens)
    elif model is None:
        from polybit.hub.random_model import random_float

        floating = random_float(random_shape(config))
        jobs = speed_model.float_jobs(floating, "bf16", prompt=prompt, tokens=config.tokens)
    else:
        jobs = []
    files: dict[str, Path] = {}
    if config.gguf is not None:
        files = {Path(name).stem: Path(name) for name in config.gguf.split(",") if name}
        if not llama.available():
            raise PolybitError("--gguf needs llama.cpp's Python bindings: run pip install llama-cpp-python")
    elif model is None and llama.available():
        cache = cache_directory() / "gguf"
        cache.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        files = llama.random_files(random_shape(config), list(GGUF_TYPES), cache, threads=threads, pure=not config.ends)
    ids = prompt[0].tolist()
    for name, path in files.items():
        jobs += llama.jobs(path, name, threads=torch.get_num_threads(), prompt=ids, tokens=config.tokens)
    return jobs


def random_shape(config: BenchConfig) -> Any:
    """Sizes of the random model."""
    from polybit.hub.random_model import Shape

    sizes = ("hidden", "layers", "intermediate", "vocabulary", "heads", "kv_heads")
    return Shape(**{name: getattr(config, name) for name in sizes})


def matrix(text: str) -> tuple[int, int]:
    """Rows and columns from `4096x4096`."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise PolybitError(f"--shape {text} is no matrix: give rows x columns, as in 4096x4096")
    return int(parts[0]), int(parts[1])


def with_ratios(table: list[dict[str, Any]], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each of our rows with its paired speed against the fastest peer that reads at least as many bits."""
    from polybit.speed.timing import paired_ratio

    for row in table:
        kind = row["engine"].removeprefix("polybit")
        if row["engine"] == "polybit" + kind:
            others = [r for r in table if r["engine"] in ("torch" + kind, "llama.cpp" + kind)]
            equal = [r for r in others if r["bits"] >= row["bits"] - 0.3] or others
            if equal:
                best = max(equal, key=lambda r: r["per_second"])
                row["ratio"] = {"of": best["name"], **paired_ratio(found, row["name"], best["name"])}
    return table


def show(what: str, numbers: Mapping[str, Any], config: BenchConfig) -> None:
    """The table, the figure, and what to do next."""
    from rich.console import Console

    from polybit.report.speed import speed_against_bits, table

    if what == "switch":
        low, middle, high = (1e6 * numbers[key] for key in ("p20", "seconds", "p80"))
        print(f"switching {numbers['layers']} layers takes {middle:.0f} µs (p20 {low:.0f}, p80 {high:.0f})")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has room for every column
    rows = numbers["rows"]
    unit = "tokens" if what == "generate" else ""
    writing = [row for row in rows if "prompt" not in row["engine"]]
    reading = [row for row in rows if "prompt" in row["engine"]]
    title = f"writing, {config.tokens} tokens" if unit else f"{config.shape}, {config.batch} tokens at once"
    where = numbers.get("gpu") or f"{numbers['threads']} threads"
    console.print(table(writing, f"{title}, {where}, {config.rounds} rounds", unit))
    for note in numbers.get("notes", ()):
        print(note)
    if reading:
        console.print(table(reading, f"reading a prompt of {config.prompt} tokens", unit))
    if "constants_file" in numbers:
        print(f"kept for `polybit plan`: {numbers['constants_file']}")
    if config.chart is not None:
        text = speed_against_bits(writing, unit or "calls")
        with atomic_path(config.chart) as staged:
            staged.write_text(text, encoding="utf-8")
        print(f"{config.chart}: written")
