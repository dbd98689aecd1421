"""Tokens per second of whole models: every width of a polybit model, plain transformers, bf16, llama.cpp; switching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polybit.hub.decode import Decoder, supported
from polybit.kernels import ops
from polybit.nn import switch
from polybit.nn.convert import ends
from polybit.speed.timing import Job, percentile


def polybit_jobs(
    model: nn.Module,
    presets: Sequence[str],
    *,
    prompt: Tensor,
    tokens: int,
    arithmetics: Sequence[ops.Arithmetic] = ("int16",),
) -> list[Job]:
    """At every preset: decoding by the fast path in each arithmetic; transformers' generate and reading the
    prompt with those of the first arithmetic.
    """
    room = prompt.shape[1] + tokens
    decoder = Decoder(model, room) if supported(model) else None
    jobs = []
    for preset in presets:
        size, bits = bytes_per_token(model, preset)

        def at_preset(
            work: Callable[[], Any], arithmetic: ops.Arithmetic = arithmetics[0], preset: str = preset
        ) -> Callable[[int], Any]:
            def call(_: int) -> Any:
                switch.multiply_by(switch.use(model, preset), arithmetic)
                return work()

            return call

        def job(name: str, work: Callable[[int], Any], bits: float = bits, size: int = size) -> Job:
            return Job(name, "polybit", work, 1, size * tokens, bits=bits, unit=tokens)

        if decoder is not None:
            work = partial(decode, decoder, tokens)
            jobs += [job(f"polybit {preset} {arithmetic}", at_preset(work, arithmetic)) for arithmetic in arithmetics]
        jobs.append(job(f"transformers {preset}", at_preset(partial(continue_by_transformers, model, prompt, tokens))))
        reading = at_preset(partial(read, model, prompt))
        jobs.append(Job(f"prompt {preset}", "polybit prompt", reading, 1, 0, bits=bits, unit=prompt.shape[1]))
    return jobs


def float_jobs(model: nn.Module, name: str, *, prompt: Tensor, tokens: int) -> list[Job]:
    """transformers' generate and forward pass on a float model."""
    size = sum(p.numel() * p.element_size() for p in model.parameters()) - embedding_bytes(model)
    bits = 8.0 * next(p.element_size() for p in model.parameters())
    return [
        Job(
            f"transformers {name}",
            "torch",
            lambda _: continue_by_transformers(model, prompt, tokens),
            1,
            size * tokens,
            bits=bits,
            unit=tokens,
        ),
        Job(f"prompt {name}", "torch prompt", lambda _: read(model, prompt), 1, 0, bits=bits, unit=prompt.shape[1]),
    ]


@torch.inference_mode()
def decode(decoder: Decoder, tokens: int) -> None:
    """Greedy tokens from an empty text; what was written before is overwritten."""
    decoder.length, token = 0, 1
    for _ in range(tokens):
        token = int(decoder.step(token).argmax())


@torch.inference_mode()
def continue_by_transformers(model: Any, prompt: Tensor, tokens: int) -> None:
    """Greedy tokens after one token, so that every pass of transformers' generate reads one."""
    model.generate(
        prompt[:, :1],
        attention_mask=torch.ones_like(prompt[:, :1]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


@torch.inference_mode()
def read(model: Any, prompt: Tensor) -> None:
    """One pass over the prompt, with the logits of its last token."""
    model(input_ids=prompt, use_cache=True, logits_to_keep=1)


def bytes_per_token(model: nn.Module, preset: str) -> tuple[int, float]:
    """Bytes one decoding step must read at a preset – all but an untied embedding – and effective bits per weight."""
    size = weights = 0
    embedding, head = ends(model)
    lookup = embedding if head is not None and getattr(head, "source", (None,))[0] is not embedding else None
    with switch.at(model, preset):
        for layer in switch.stored_layers(model).values():
            if layer is not lookup:
                size += layer.planes.nbytes(layer.width)
                weights += layer.rows * layer.columns
    stored = {id(p) for layer in switch.stored_layers(model).values() for p in layer.parameters()}
    floats = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in stored)
    return size + floats - embedding_bytes(model), 8 * size / max(weights, 1)


def embedding_bytes(model: nn.Module) -> int:
    """Bytes of a float embedding that is only looked up, 0 where it is the output head too."""
    embedding, head = ends(model)
    weight = getattr(embedding, "weight", None)
    if weight is None or head is None or getattr(head, "weight", None) is weight:
        return 0
    return weight.numel() * weight.element_size()


def switch_seconds(model: nn.Module, presets: Sequence[str], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds to switch a whole model from one preset to the next: median, 20th and 80th percentile."""
    seconds = []
    for turn in range(rounds * len(presets) + len(presets)):
        wanted = presets[turn % len(presets)]
        begin = clock()
        switch.use(model, wanted)
        seconds.append(clock() - begin)
    seconds = seconds[len(presets) :]
    return {
        "layers": len(switch.stored_layers(model)),
        "seconds": percentile(seconds, 0.5),
        "p20": percentile(seconds, 0.2),
        "p80": percentile(seconds, 0.8),
    }
