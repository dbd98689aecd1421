"""Time what this machine runs at every width, beside what else can run the same model."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.compress.ends import end_targets, hold_ends
from polybit.compress.sizes import default_presets, quantized_layers
from polybit.core.records import Run
from polybit.core.runtime import PolybitError, warn
from polybit.hub.load import load, load_float
from polybit.hub.models import resolve
from polybit.hub.random_model import Shape, random_float, random_quantized, skeleton
from polybit.options.bench import BenchOptions
from polybit.options.checks import names_of, plain
from polybit.speed import llama, models, products, products_gpu
from polybit.speed.machine import cache_directory, keep
from polybit.speed.timing import Job, MemoryProbe, against_peers, clock_for, summarize, time_rounds

GGUF_TYPES = ("Q8_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K")


def bench(what: str, model: str | None, options: BenchOptions) -> Run:
    """Measure speed: WHAT is linear (one product), generate (tokens per second), or switch (changing the width).

    MODEL is a polybit checkpoint; without one a random Llama of half a billion weights is timed.
    """
    if what == "linear" and model is not None:
        raise PolybitError(f"bench linear times one random matrix, not {model!r}: use bench generate {model}")
    if options.device == "cuda" and what != "linear":
        raise PolybitError(f"--device cuda is for bench linear only, not for bench {what}: leave it out")
    run = Run("bench", {"what": what, "model": model, **plain(options)})
    threads = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with run.timed(), torch.inference_mode():
            run.numbers = linear(options) if what == "linear" else whole_models(what, model, options)
    finally:
        torch.set_num_threads(threads)
    return run


def linear(options: BenchOptions) -> dict[str, Any]:
    """Every width of one product; keeps the machine's constants when one token is multiplied."""
    widths, arithmetics = options.asked, options.arithmetics()
    on = products_gpu.time_on_gpu if options.device == "cuda" else products.time_on_cpu
    numbers = on(*options.matrix(), options.batch, widths, arithmetics, options.rounds, peers=options.peers)
    if options.device == "cpu" and options.batch == 1:
        constants = products.constants(numbers, widths, arithmetics[0])
        numbers["constants"] = asdict(constants)
        try:
            numbers["constants_file"] = str(keep(constants))
        except OSError as error:
            warn(f"the speed of this machine is not kept for polybit plan, its cache cannot be written: {error}")
    return numbers


def whole_models(what: str, model: str | None, options: BenchOptions) -> dict[str, Any]:
    """Tokens per second of every width by the fast path and by transformers, against bf16 and llama.cpp; or the time
    from one width to the next.
    """
    loaded = open_quantized(model, options)
    of_its_own = model is not None and options.widths is None
    presets = default_presets(loaded) if of_its_own else [f"w{b}" for b in options.asked]
    if what == "switch":
        return models.switch_seconds(loaded, presets, options.rounds, time.perf_counter)
    prompt = torch.randint(0, loaded.config.get_text_config().vocab_size, (1, options.prompt))
    jobs = models.polybit_jobs(loaded, presets, prompt=prompt, tokens=options.tokens, arithmetics=options.arithmetics())
    if options.peers:
        jobs += [*float_peers(model, options, prompt), *llama_peers(model, options, prompt)]
    clock = clock_for(torch.get_num_threads())
    found = time_rounds(jobs, options.rounds, MemoryProbe(clock), clock, "bench generate")
    return {"rows": against_peers(summarize(jobs, found), found), "threads": torch.get_num_threads()}


def open_quantized(model: str | None, options: BenchOptions) -> Any:
    """The polybit model to time."""
    if model is None:
        made = random_quantized(random_shape(options))
        names = [target.name for target in end_targets(skeleton(random_shape(options)))] if options.ends else []
        hold_ends(made, names, options.ends, options.asked)
        return made
    loaded, _ = load(resolve(model), trust_remote_code=options.trust_remote_code)
    if not quantized_layers(loaded):
        raise PolybitError(
            f"{model} is a float model: quantize it first, as in `polybit quantize {model} --out DIR`, "
            "or leave MODEL out to time a random one"
        )
    return loaded


def float_peers(model: str | None, options: BenchOptions, prompt: Tensor) -> list[Job]:
    """bf16 transformers: the float model that was named, or a random one beside a random model."""
    if options.float_model is not None:
        where, code = resolve(options.float_model), options.trust_remote_code
        floating, _ = load_float(where, dtype=torch.bfloat16, trust_remote_code=code)
    elif model is None:
        floating = random_float(random_shape(options))
    else:
        return []
    return models.float_jobs(floating, "bf16", prompt=prompt, tokens=options.tokens)


def llama_peers(model: str | None, options: BenchOptions, prompt: Tensor) -> list[Job]:
    """llama.cpp where it can be imported: the files that were named, or random ones beside a random model."""
    threads = torch.get_num_threads()
    files: dict[str, Path] = {}
    if options.gguf is not None:
        files = {Path(name).stem: Path(name) for name in names_of(options.gguf)}
        if not llama.available():
            raise PolybitError("--gguf needs llama.cpp's Python bindings: run pip install llama-cpp-python")
    elif model is None and llama.available():
        cache = cache_directory() / "gguf"
        cache.mkdir(parents=True, exist_ok=True)
        shape, pure = random_shape(options), not options.ends
        files = llama.random_files(shape, list(GGUF_TYPES), cache, threads=threads, pure=pure)
    ids = prompt[0].tolist()
    each = (llama.jobs(at, name, threads=threads, prompt=ids, tokens=options.tokens) for name, at in files.items())
    return [job for jobs in each for job in jobs]


def random_shape(options: BenchOptions) -> Shape:
    """Sizes of the random model."""
    sizes = ("hidden", "layers", "intermediate", "vocabulary", "heads", "kv_heads")
    return Shape(**{name: getattr(options, name) for name in sizes})
