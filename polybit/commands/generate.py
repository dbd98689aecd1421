"""`polybit generate`: answer a prompt at a chosen width."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from polybit.hub.models import open_model
from polybit.core.runtime import PolybitError

NARROW = 4  # bits up to which int8 activations add less than 2 % to the KL the weights cost (docs/results.md)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Flags of `polybit generate`."""

    prompt: str
    """What to answer."""
    precision: str | None = None
    """Width to run at, as in w3 or w4a8 (default: the widest stored; a float model runs in float)."""
    activations: Literal["auto", "float", "int16", "int8"] = "auto"
    """How inputs are rounded before a product: float = not at all, exact and many times slower; int16 = error below
    1e-4; int8 = fastest (auto: int8 for weights of 4 bits or fewer, whose own error hides it, int16 for wider ones)."""
    max_tokens: int = 64
    """Most new tokens to write."""
    temperature: float = 0.0
    """0 = greedy; higher draws more freely."""
    seed: int = 0
    """Seed of the draw when the temperature is above 0."""
    raw: bool = False
    """Continue the prompt as it stands instead of wrapping it in the model's chat template."""
    json: Path | None = None
    """Write the answer and its timing there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def generate(model: str, /, *, config: Annotated[GenerateConfig, Parameter(name="*")]) -> None:
    """Answer a prompt with MODEL (a polybit directory, any Hugging Face id or path, or tinychat)."""
    if config.max_tokens < 1:
        raise PolybitError(f"--max-tokens {config.max_tokens} is not possible: give 1 or more")
    if not 0 <= config.temperature < float("inf"):
        raise PolybitError(f"--temperature {config.temperature} is not possible: give 0 (greedy) or a positive number")
    if not config.prompt.strip():
        raise PolybitError("--prompt is empty: give some text to answer")
    import torch

    from polybit.core.records import Run
    from polybit.hub.decode import generate as write
    from polybit.hub.lm import longest_input
    from polybit.nn.linear import QuantWeight
    from polybit.nn.switch import current, use

    loaded, tokenizer = open_model(model, trust_remote_code=config.trust_remote_code)
    quantized = any(isinstance(module, QuantWeight) for module in loaded.modules())
    if config.precision is not None:
        use(loaded, config.precision)
    if quantized:
        choose_activations(loaded, config.activations)
    ids = prompt_ids(tokenizer, config.prompt, raw=config.raw)
    room = longest_input(loaded)
    if room is not None and ids.shape[1] >= room:
        raise PolybitError(f"the prompt has {ids.shape[1]} tokens but the model reads at most {room}: shorten it")
    torch.manual_seed(config.seed)
    sampling = {"do_sample": True, "temperature": config.temperature} if config.temperature else {"do_sample": False}
    started = time.perf_counter()
    with torch.inference_mode():
        output = write(
            loaded,
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(config.max_tokens, (room or 1 << 30) - ids.shape[1]),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - started
    new = output[0, ids.shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True).strip()
    print(answer)
    if config.json is not None:
        numbers = {
            "answer": answer,
            "tokens": [int(t) for t in new],
            "precision": str(current(loaded)) if quantized else "float",
            "new_tokens": len(new),
            "tokens_per_second": len(new) / seconds,
        }
        run = Run("generate", {"model": model, "prompt": config.prompt, "max_tokens": config.max_tokens}, numbers)
        run.seconds = seconds
        run.write(config.json)


def choose_activations(model, asked: str) -> None:
    """Tell every layer how to multiply; see the flag."""
    from polybit.kernels.ops import best_mode
    from polybit.nn.switch import panel

    for layer in panel(model).layers.values():
        best = best_mode(layer.qplanes.device)
        automatic = "int8" if best == "int16" and layer.width <= NARROW else best
        layer.activations = automatic if asked == "auto" else asked  # type: ignore[assignment]


def prompt_ids(tokenizer, prompt: str, *, raw: bool):
    """Token ids [1, T] of a prompt, through the chat template when the model has one."""
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
