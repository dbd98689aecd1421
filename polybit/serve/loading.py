"""From a checkpoint on disk to a service that answers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.hub.lm import longest_input
from polybit.hub.models import open_model, resolve
from polybit.nn.adapters import worn_bytes
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import at, panel, presets
from polybit.serve.engine import Engine
from polybit.serve.grammar import Grammars
from polybit.serve.policy import AutoPolicy, Needs
from polybit.serve.router import ROUTER, PromptFeatures, Router, embedding_of, read_router
from polybit.serve.runners import Runner, make_runner
from polybit.serve.service import Service
from polybit.serve.signals import FirstBlocks
from polybit.serve.templates import Templates

SMALL = (
    16 << 20
)  # bytes of a model below which a second thread takes more from whoever reads and writes sockets than it gives
LONGEST = 8192  # tokens unless told otherwise: a place in the cache is laid out whole
WHOLE = "float"  # the one precision of a model that is not quantized


def load_service(
    model: str,
    *,
    name: str | None = None,
    default: str | None = None,
    auto: tuple[str, ...] = (),
    pressure: tuple[float, float] = (0.75, 2.0),
    slots: int = 8,
    context: int | None = None,
    most_tokens: int = 4096,
    queue: int = 64,
    chunk: int = 256,
    threads: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Service:
    """Load a checkpoint or a float model and start its engine. pressure: AutoPolicy's start and full."""
    loaded, tokenizer = open_model(model, trust_remote_code=trust_remote_code, device=device)
    if tokenizer is None:
        raise PolybitError(f"{model} has no tokenizer: save one with the checkpoint")
    service = service_of(
        loaded,
        tokenizer,
        name or Path(os.path.abspath(model)).name.replace("@", "-"),  # noqa: PTH100  # as the user wrote it, links kept
        default=default,
        auto=auto,
        pressure=pressure,
        slots=slots,
        context=context,
        most_tokens=most_tokens,
        queue=queue,
        chunk=chunk,
        threads=threads or threads_for(loaded),
        directory=Path(resolve(model)),
    )
    service.templates.begin()
    return service


def service_of(
    loaded: Any,
    tokenizer: Any,
    name: str,
    *,
    default: str | None = None,
    auto: tuple[str, ...] = (),
    pressure: tuple[float, float] = (0.75, 2.0),
    slots: int = 8,
    context: int | None = None,
    most_tokens: int = 4096,
    queue: int = 64,
    chunk: int = 256,
    threads: int | None = None,
    directory: Path | None = None,
) -> Service:
    """The service of a model in memory, its engine started. directory: where a router may lie."""
    tokenizer("a")  # settles padding and truncation, which threads must not do at the same time
    room = room_of(loaded, context)
    quantized = any(isinstance(module, QuantWeight) for module in loaded.modules())
    runner = make_runner(loaded, slots=slots, room=room, quantized=quantized)
    precisions = served(loaded, runner, default) if quantized else (WHOLE,)
    allowed = tuple(width for width in precisions if width in auto) if auto else precisions
    missing = [width for width in auto if width not in precisions]
    if missing:
        raise PolybitError(f"--auto {missing[0]} is not served: choose from {', '.join(precisions)}")
    widest = sorted((w for w in allowed if is_width(w)), key=lambda w: -Precision.parse(w).w) or list(allowed)
    router = router_of(directory, loaded, precisions)
    ends = ends_of(loaded, tokenizer)
    engine = Engine(runner, tokenizer, queue=queue, chunk=chunk, threads=threads)
    engine.start()
    return Service(
        name=name,
        tokenizer=tokenizer,
        engine=engine,
        precisions=precisions,
        policy=AutoPolicy(tuple(widest), *pressure, needs=needs_of(router, loaded, tokenizer)),
        templates=Templates.of(tokenizer),
        grammars=Grammars(tokenizer, int(loaded.config.get_text_config().vocab_size), ends),
        ends=ends,
        most_tokens=min(most_tokens, room),
        created=int(time.time()),
        margins={} if router is None else router.margins,
        notes={
            "context": room,
            "runner": {name: "rows" if runner.exact(name) else "transformers" for name in precisions},
            "bytes_per_token": bytes_read(loaded, precisions) if quantized else {},
        },
    )


def threads_for(model: Any) -> int | None:
    """Threads of the engine unless told otherwise: one for a small model."""
    return 1 if sum(p.numel() * p.element_size() for p in model.parameters()) < SMALL else None


def router_of(directory: Path | None, model: Any, precisions: tuple[str, ...]) -> Router | None:
    """A checkpoint's router; None where it has none."""
    if directory is None or not directory.is_dir() or not any(is_width(name) for name in precisions):
        return None
    found = read_router(directory, precisions, embedding_of(model).shape[1])
    if found is not None and found.states_EK.size and not FirstBlocks.fits(model):
        raise PolybitError(
            f"{directory / ROUTER} reads the model's first blocks, which the compiled decoder does not read here: fit "
            "it again on this machine with polybit route"
        )
    return found


def needs_of(router: Router | None, model: Any, tokenizer: Any) -> Needs | None:
    """What a router asks for."""
    if router is None:
        return None
    blocks = FirstBlocks(model, router.widths[0]) if router.states_EK.size else None
    features = PromptFeatures(tokenizer, embedding_of(model), router.basis_DK, blocks, router.states_EK)
    return lambda tokens: router.choose(features(tokens))


def room_of(model: Any, asked: int | None) -> int:
    """Tokens of a place: what was asked for if the model can read it."""
    longest = longest_input(model)
    if asked is not None and longest is not None and asked > longest:
        raise PolybitError(f"--context {asked} is more than the {longest} tokens the model reads: give less")
    return asked or min(longest or LONGEST, LONGEST)


def served(model: Any, runner: Runner, default: str | None) -> tuple[str, ...]:
    """Every precision that can be asked for: stored widths and presets that the runner reads, the default first."""
    layers = panel(model).layers.values()
    least = min(layer.bits for layer in layers)
    names = [*(f"w{bits}" for bits in range(min(least, 8), 1, -1)), *(n for n in presets(model) if not is_width(n))]
    stored = set(widths_of(model)) | {name for name in names if not is_width(name)}
    able = []
    for name in names:
        if name not in stored:
            continue
        try:
            runner.setting(name)
        except PolybitError:
            continue  # rounds activations, which rows are not read at
        able.append(name)
    if not able:
        raise PolybitError("no precision of this checkpoint can be served: it rounds activations at every one")
    if default is not None and default not in able:
        raise PolybitError(f"--precision {default} is not served: choose from {', '.join(able)}")
    return tuple(sorted(able, key=lambda name: name != default)) if default is not None else tuple(able)


def widths_of(model: Any) -> list[str]:
    """The widths the checkpoint was made for."""
    declared = getattr(model.config, "quantization_config", None)
    widths = declared.get("widths") if isinstance(declared, dict) else getattr(declared, "widths", ())
    return [f"w{bits}" for bits in widths or ()]


def bytes_read(model: Any, precisions: tuple[str, ...]) -> dict[str, int]:
    """Bytes of weights that one token reads at each precision."""
    found = {}
    for name in precisions:
        with at(model, name):
            layers = [layer for layer in panel(model).layers.values() if isinstance(layer, QuantWeight)]
            found[name] = sum(layer.planes.nbytes(layer.reading) + worn_bytes(layer) for layer in layers)
    return found


def is_width(name: str) -> bool:
    """Whether a name is a plain width."""
    return name[:1] == "w" and name[1:].isdigit()


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, the configuration's, and those of the chat's turns."""
    config = getattr(model, "generation_config", None) or model.config
    value = getattr(config, "eos_token_id", None)
    values = value if isinstance(value, (list, tuple)) else [value]
    return frozenset(int(token) for token in [*values, tokenizer.eos_token_id] if token is not None)
