"""What this installation can do: versions, compiled kernels, GPU, cache, free disk; and what to do about the rest."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch

from polybit.core.records import Run
from polybit.core.runtime import nearest
from polybit.hub.models import EMBEDDED, open_model
from polybit.kernels import cpu, search, step
from polybit.options.checks import plain
from polybit.options.doctor import DoctorOptions
from polybit.report.tables import size
from polybit.speed.machine import cache_directory

State = Literal["good", "note", "fault"]
LEAST_DISK = 5e9  # bytes; a checkpoint of a small model and its workspace
OLDEST = {"torch": (2, 6), "transformers": (5, 3)}
EXTRAS = {  # extra -> a library of it, and what it is for
    "data": ("datasets", "hub datasets and .parquet files"),
    "allocate": ("scipy", "polybit allocate"),
    "report": ("matplotlib", "figures"),
    "train": ("accelerate", "polybit train and align"),
    "serve": ("fastapi", "polybit serve"),
    "judge": ("openai", "polybit judge with an endpoint"),
    "lm-eval": ("lm_eval", "polybit eval --lm-eval"),
    "export": ("gguf", "polybit export"),
    "cluster": ("ray", "--ray of the verbs that share work"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; remedy: what to do, where there is something to do."""

    what: str
    state: State
    found: str
    remedy: str = ""


def doctor(options: DoctorOptions) -> Run:
    """Look at the installation and the machine; nothing is changed."""
    run = Run("doctor", plain(options))
    with run.timed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what kernels would warn of stands in the list
        checks = [*versions(), *kernels(), *processor(), *gpu(), *places(options.where), *extras(), writes()]
    run.numbers = {"checks": [asdict(check) for check in checks]}
    return run


def versions() -> Iterator[Check]:
    """polybit, Python, and the two libraries it stands on."""
    yield Check("polybit", "good", f"{installed('polybit') or 'not installed'}, {Path(__file__).parents[1]}")
    yield Check("python", "good", f"{platform.python_version()}, {sys.executable}")
    for name, oldest in OLDEST.items():
        found = installed(name)
        numbers = tuple(int(part) for part in (found or "0.0").split(".")[:2] if part.isdigit())
        wanted = ".".join(map(str, oldest))
        if numbers < oldest:
            yield Check(name, "fault", found or "missing", f"pip install '{name}>={wanted}'")
        elif name == "transformers" and numbers[0] > oldest[0]:
            yield Check(
                name,
                "note",
                str(found),
                f"polybit was written for version {oldest[0]}: pip install '{name}<{oldest[0] + 1}'",
            )
        else:
            yield Check(name, "good", str(found))


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def kernels() -> Iterator[Check]:
    """The three compiled parts, and the instruction set products run with."""
    remedy = "install a C++ compiler and reinstall polybit, or use a wheel"
    for what, library, without in (
        ("products", cpu.library(), "answers are many times slower"),
        ("decoding", step.library(), "answers are slower"),
        ("search", search.library(), "quantizing is many times slower"),
    ):
        if library is None:
            yield Check(f"compiled {what}", "fault", f"missing: {without}", remedy)
        else:
            yield Check(f"compiled {what}", "good", "there")
    sets = cpu.instruction_sets()
    if sets:
        slow = sets[0].lower() in ("scalar", "portable", "generic")
        advice = "this processor or virtual machine has no AVX2 or NEON: expect a tenth of the speed" if slow else ""
        yield Check("instruction set", "note" if slow else "good", f"{sets[0]} (of {', '.join(sets)})", advice)


def processor() -> Iterator[Check]:
    """Threads against cores, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    advice = f"set OMP_NUM_THREADS={cores}, unless other programs need the cores" if threads != cores else ""
    yield Check("threads", "note" if advice else "good", f"{threads} of {cores} cores", advice)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield Check("memory", "good", size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def gpu() -> Iterator[Check]:
    """A GPU that torch sees, and triton for its kernels."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        hint = "" if built or not shutil.which("nvidia-smi") else "install a torch with CUDA: https://pytorch.org"
        yield Check("gpu", "note" if hint else "good", "none that torch sees; the CPU is used", hint)
        return
    yield Check("gpu", "good", f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    found = installed("triton")
    yield Check(
        "triton", "good" if found else "fault", found or "missing", "" if found else "pip install 'polybit[gpu]'"
    )


def places(where: Path) -> Iterator[Check]:
    """Free disk where checkpoints go, and where models and measurements are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, path, instead in (
        ("free disk", where, "write checkpoints elsewhere"),
        ("model cache", Path(HF_HUB_CACHE), "set HF_HOME to another place"),
        ("polybit cache", cache_directory(), "set POLYBIT_CACHE to another place"),
    ):
        there = nearest(path)
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Check(what, "fault", f"{path} cannot be written", f"make it writable, or {instead}")
        elif free < LEAST_DISK and what != "polybit cache":
            yield Check(what, "note", f"{size(free)} free at {path}", f"free some space, or {instead}")
        else:
            yield Check(what, "good", f"{size(free)} free at {path}")


def extras() -> Iterator[Check]:
    """Optional libraries; a missing one is no fault."""
    from importlib.util import find_spec

    known = {line.split("extra ==")[1].strip(" '\"") for line in requires_of() if "extra ==" in line}
    for name, (library, purpose) in EXTRAS.items():
        if known and name not in known:
            continue
        if find_spec(library) is None:
            yield Check(f"extra {name}", "note", f"not installed: {purpose}", f"pip install 'polybit[{name}]'")
        else:
            yield Check(f"extra {name}", "good", purpose)


def requires_of() -> list[str]:
    """What the installed package says it needs."""
    try:
        return requires("polybit") or []
    except PackageNotFoundError:
        return []


def writes() -> Check:
    """Whether the embedded model answers at all."""
    try:
        model, tokenizer = open_model(EMBEDDED)
        ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
        good = bool(torch.isfinite(logits).all())
        return Check(
            "embedded model", "good" if good else "fault", "reads a text" if good else "gives no finite numbers"
        )
    except Exception as error:  # whatever is broken is what doctor is asked for
        return Check("embedded model", "fault", f"{type(error).__name__}: {error!s:.120}", "reinstall polybit")
