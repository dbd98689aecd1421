"""Answer a prompt at a chosen width."""

from __future__ import annotations

import time

import torch

from polybit.acts.streaming import Heard, Say
from polybit.compress.sizes import warn_of_width
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.data.files import mend
from polybit.data.text import in_template
from polybit.hub.decode import generate as write
from polybit.hub.lm import longest_input
from polybit.hub.models import open_model
from polybit.kernels.ops import best_arithmetic
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import current, stored_layers, use
from polybit.options.checks import plain
from polybit.options.generate import GenerateOptions

NARROW = 4  # bits up to which int8 adds less than 2 % to the KL the weights cost (docs/results/rounded-inputs.md)


def generate(model: str, options: GenerateOptions, say: Say | None = None) -> Run:
    """Answer a prompt with MODEL (a polybit directory, any Hugging Face id or path, or tinychat).

    say: called with each piece of the answer as it is written.
    """
    loaded, tokenizer = open_model(model, trust_remote_code=options.trust_remote_code, device=options.device)
    quantized = any(isinstance(module, QuantWeight) for module in loaded.modules())
    if options.precision is not None:
        use(loaded, options.precision)
        warn_of_width(loaded, options.precision)
    if quantized:
        choose_arithmetic(loaded, options.arithmetic)
    ids = prompt_ids(tokenizer, options.prompt, raw=options.raw).to(next(loaded.parameters()).device)
    room = longest_input(loaded)
    if room is not None and ids.shape[1] >= room:
        raise PolybitError(f"the prompt has {ids.shape[1]} tokens but the model reads at most {room}: shorten it")
    torch.manual_seed(options.seed)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    started = time.perf_counter()
    with torch.inference_mode():
        output = write(
            loaded,
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(options.max_tokens, (room or 1 << 30) - ids.shape[1]),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=None if say is None else Heard(tokenizer, ids[0].tolist(), say),
            **sampling,
        )
    seconds = time.perf_counter() - started
    new = output[0, ids.shape[1] :]
    numbers = {
        "answer": tokenizer.decode(new, skip_special_tokens=True).strip(),
        "tokens": [int(t) for t in new],
        "precision": str(current(loaded)) if quantized else "float",
        "new_tokens": len(new),
        "tokens_per_second": len(new) / seconds,
    }
    return Run("generate", {"model": model, **plain(options)}, numbers, seconds=seconds)


def choose_arithmetic(model, asked: str) -> None:
    """Tell every layer how to multiply; see the flag."""
    for layer in stored_layers(model).values():
        best = best_arithmetic(layer.qplanes.device)
        automatic = "int8" if best == "int16" and layer.width <= NARROW else best
        layer.arithmetic = automatic if asked == "auto" else asked  # type: ignore[assignment]


def prompt_ids(tokenizer, prompt: str, *, raw: bool):
    """Token ids [1, T] of a prompt, through the chat template when the model has one."""
    if tokenizer.chat_template and not raw:
        text = in_template(tokenizer, [{"role": "user", "content": mend(prompt)}], add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return tokenizer(mend(prompt), return_tensors="pt")["input_ids"]
