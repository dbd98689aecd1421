"""Fit the router of a checkpoint: which width a prompt needs, and is it better than chance?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polybit.compress.sizes import base_model, plain_widths, stored_widths
from polybit.core.precision import Precision
from polybit.core.records import Run
from polybit.core.runtime import PolybitError, progress, track
from polybit.data.chat import encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template
from polybit.evals.token_flip import answer_batches, measure_tokens
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model, resolve
from polybit.hub.rows import TokenRows
from polybit.options.checks import file_can_be_written, names_of, plain
from polybit.options.route import RouteOptions
from polybit.serve.gate_fit import fit_gate, read_pair
from polybit.serve.loading import bytes_read
from polybit.serve.router import (
    ROUTER,
    PromptFeatures,
    checkpoint_digest,
    embedding_of,
    main_directions,
    write_router,
)
from polybit.serve.router_fit import fit, judge
from polybit.serve.runners import RowRunner
from polybit.serve.signals import FirstBlocks, main_parts

LEAST = 20  # prompts from which anything can be learnt


def route(model: str, options: RouteOptions) -> Run:
    """Learn which width a prompt needs, judge it against random routing and the oracle, keep it in the checkpoint."""
    run = Run("route", {"model": model, **plain(options)})
    with run.timed():
        run.numbers = learnt(Path(resolve(model)), options)
    return run


def learnt(directory: Path, options: RouteOptions) -> dict[str, Any]:
    """Measure, fit, judge and keep; the numbers of the run."""
    if not options.dry_run:
        file_can_be_written("the router", directory / ROUTER)
    quantized, reference = open_both(directory, options)
    widths = widths_asked(quantized.model, options)
    prompts, answers = answered(reference, options)
    harms_NW = harms(reference, quantized, widths, prompts, answers)
    embedding_VD = embedding_of(quantized.model)
    basis_DK = main_directions(embedding_VD)
    blocks, states_EK = None, np.empty((0, 0))
    if FirstBlocks.fits(quantized.model):
        blocks = FirstBlocks(quantized.model, widths[0])
        states_EK = main_parts(np.stack([blocks(prompt) for prompt in prompts]), options.states)
    features = PromptFeatures(quantized.tokenizer, embedding_VD, basis_DK, blocks, states_EK)
    began = process_time()
    features_NF = np.stack([features(prompt) for prompt in prompts])
    seconds = (process_time() - began) / len(prompts)
    bits = [float(Precision.parse(width).w) for width in widths]
    numbers = judge(features_NF, harms_NW, bits, options.budget, seed=options.seed)
    router = fit(features_NF, harms_NW, bits, widths, basis_DK, options.budget, states_EK)
    began = process_time()
    for row in features_NF:
        router.choose(row)
    seconds += (process_time() - began) / len(prompts)
    gates = fitted_gates(quantized.model, widths, prompts, answers, options)
    router = replace(router, margins={pair: found["margin"] for pair, found in gates.items()})
    if not options.dry_run:
        write_router(directory / ROUTER, router, checkpoint_digest(directory))
    return numbers | {
        "widths": list(widths),
        "seconds_per_prompt": seconds,
        "gates": gates,
        "kept": not options.dry_run,
    }


def fitted_gates(
    model: Any, widths: tuple[str, ...], prompts: list[list[int]], answers: list[list[int]], options: RouteOptions
) -> dict[str, Any]:
    """Margins of gates that decide at the widest width, by "low:high"; none where no compiled code reads rows."""
    if not FirstBlocks.fits(model) or not options.gate_prompts:
        return {}
    chosen = slice(0, options.gate_prompts)
    prompts, answers = prompts[chosen], answers[chosen]
    runner = RowRunner(model, slots=2, room=max(map(len, prompts)) + options.max_tokens + 1)
    high, size, found = widths[0], bytes_read(model, widths), {}
    with progress("margins of gates", (len(widths) - 1) * len(prompts)) as step:
        for low in widths[1:]:
            reading = read_pair(runner, low, high, prompts, answers, lambda: step(1))
            found[f"{low}:{high}"] = fit_gate(reading, size[high] / size[low], seed=options.seed)
    return found


def open_both(directory: Path, options: RouteOptions) -> tuple[LocalLM, LocalLM]:
    """The checkpoint and its float model."""
    quantized, tokenizer = open_model(
        str(directory), trust_remote_code=options.trust_remote_code, device=options.device
    )
    if stored_widths(quantized) is None:
        raise PolybitError(f"{directory} is a float model, which has one precision only: quantize it first")
    named = options.reference or base_model(quantized)
    if named is None:
        raise PolybitError(f"{directory} does not say which model it was made from: name it with --reference")
    float_model, _ = open_model(named, trust_remote_code=options.trust_remote_code, device=options.device)
    if stored_widths(float_model) is not None:
        raise PolybitError(f"the reference {named} is itself quantized: give the float model it was made from")
    return LocalLM(quantized, tokenizer), LocalLM(float_model, tokenizer)


def widths_asked(model: Any, options: RouteOptions) -> tuple[str, ...]:
    """The widths to choose from, widest first."""
    stored = [f"w{bits}" for bits in plain_widths(model)]
    names = names_of(options.precision) or stored
    unknown = [name for name in names if name not in stored]
    if unknown:
        raise PolybitError(f"--precision {unknown[0]} is not stored: choose from {', '.join(stored)}")
    if len(set(names)) < 2:
        raise PolybitError("a router needs two widths to choose from: give a nested checkpoint, or more of --precision")
    found = sorted(set(names), key=lambda name: -Precision.parse(name).w)
    least = Precision.parse(found[-1]).w
    if options.budget < least:
        raise PolybitError(f"--budget {options.budget} is below the narrowest width, {least} bits: give more")
    return tuple(found)


def answered(reference: LocalLM, options: RouteOptions) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as tokens and the float model's answers to them; prompts without an answer are left out."""
    chat = has_chat_template(reference.tokenizer)
    given = gather_prompts(options.prompts, chat=chat, limit=options.limit)
    room = None if reference.max_length is None else reference.max_length - options.max_tokens
    encoded = [encode_prompt(reference.tokenizer, prompt) for prompt in given]
    prompts = [row for row in encoded if room is None or len(row) < room]
    answers = reference.generate_tokens(prompts, max_tokens=options.max_tokens, label="answers")
    kept = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    if len(kept) < LEAST:
        raise PolybitError(
            f"--prompts {options.prompts} gives {len(kept)} prompts with an answer: give {LEAST} or more"
        )
    return [prompt for prompt, _ in kept], [answer for _, answer in kept]


def harms(
    reference: LocalLM,
    quantized: LocalLM,
    widths: tuple[str, ...],
    prompts: list[list[int]],
    answers: list[list[int]],
) -> NDArray[np.float64]:
    """Mean KL(float || width) in nats per token of every answer, at every width, [N, W]."""
    if FirstBlocks.fits(quantized.model):
        return harms_by_rows(reference, quantized.model, widths, prompts, answers)
    batches = answer_batches(reference, prompts, answers)
    tokens, tables = measure_tokens(reference, quantized, widths, batches, label="harm at each width")
    counts = np.bincount(tokens.text_N, minlength=len(prompts))
    sums = [np.bincount(tokens.text_N, weights=tables[width].kl_N, minlength=len(prompts)) for width in widths]
    return np.stack(sums, axis=1) / counts[:, None]


@torch.inference_mode()
def harms_by_rows(
    reference: LocalLM, model: Any, widths: tuple[str, ...], prompts: list[list[int]], answers: list[list[int]]
) -> NDArray[np.float64]:
    """The same as the server reads the widths: faster than forward passes, and with its rounded inputs."""
    room = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    runner = RowRunner(model, slots=len(widths), room=room)
    settings = [runner.setting(width) for width in widths]
    rows = []
    pairs = list(zip(prompts, answers, strict=True))
    for prompt, answer in track(pairs, "harm at each width"):
        text = [*prompt, *answer][:-1]
        logp_TV = reference.logits(torch.tensor([text]))[0, -len(answer) :].cpu().log_softmax(-1)
        parts = [TokenRows(setting, slot, 0, text) for slot, setting in enumerate(settings)]
        found = runner.read(parts, [len(answer)] * len(parts))
        rows.append([float((logp_TV.exp() * (logp_TV - q_TV.log_softmax(-1))).sum(-1).mean()) for q_TV in found])
    return np.maximum(np.asarray(rows), 0.0)
