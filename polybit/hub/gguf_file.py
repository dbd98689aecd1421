"""A GGUF file as a float model: its weights decoded by transformers, its tokenizer made from what the file says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polybit.core.runtime import PolybitError
from polybit.hub.gguf_header import check_gguf
from polybit.hub.quiet import quiet


def is_gguf(name: str) -> bool:
    """Whether a MODEL argument is a GGUF file."""
    return name.lower().endswith(".gguf") and Path(name).is_file()


@contextmanager
def slow_bars() -> Iterator[None]:
    """transformers' bar over the tensors of a file only in a terminal, and only where it takes more than 2 seconds."""
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as reader

    shown, reader.tqdm = reader.tqdm, partial(tqdm, disable=None, delay=2, leave=False)
    try:
        yield
    finally:
        reader.tqdm = shown


def open_gguf(name: str, *, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """(model in evaluation mode, tokenizer) of a GGUF file; one sentence for what transformers cannot read of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    if find_spec("gguf") is None:
        raise PolybitError(f"{path} is read by the package gguf: run pip install 'polybit[export]'")
    check_gguf(path)
    open_model: Any = AutoModelForCausalLM.from_pretrained
    try:
        options = {"gguf_file": path.name, "dtype": dtype, "output_loading_info": True}
        with quiet(path), slow_bars():
            model, report = open_model(str(path.parent), **options)
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise PolybitError(
            f"transformers cannot read {path} ({first}): give the Hugging Face directory it was made from"
        ) from error
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = sorted(set(report["missing_keys"]) - (tied if model.config.tie_word_embeddings else set()))
    if missing or report["mismatched_keys"]:  # transformers gives these random numbers, and a warning
        name = missing[0] if missing else next(iter(report["mismatched_keys"]))[0]
        raise PolybitError(f"{path} does not hold the weight {name!r:.120} of its model: fetch it again")
    model.config.name_or_path = path.stem
    return model.eval(), tokenizer
