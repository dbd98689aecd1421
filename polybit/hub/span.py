"""Models with a span head: load one, and ask it where in a text an answer begins and ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.runtime import PolybitError, track
from polybit.data.batches import buckets, pad
from polybit.hub.lm import longest_input
from polybit.hub.load import (
    check_directory,
    check_weights,
    first_line,
    load_config,
    load_float,
    load_tokenizer,
    quantization_of,
)
from polybit.hub.quiet import quiet
from polybit.nn import switch


def load_span(name_or_path: str | Path, *, new_head: bool = False) -> tuple[nn.Module, Any]:
    """A model with a head for the start and the end of an answer, in evaluation mode, and its tokenizer.

    new_head: begin with a random head on a language model, to be trained; otherwise missing weights are refused.
    """
    from transformers import AutoModelForQuestionAnswering
    from transformers.utils import logging

    name = str(name_or_path)
    if new_head:
        return with_new_head(name)
    load_config(name)
    if Path(name).is_dir() and quantization_of(name) is None:
        check_directory(Path(name))
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is said in one sentence below
    try:
        with quiet(name):
            model, report = AutoModelForQuestionAnswering.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except PolybitError:
        raise
    except Exception as error:
        raise PolybitError(
            f"{name} cannot be used with a span head ({first_line(error)}): give a model that has one in transformers, "
            "such as GPT-2, Llama or BERT"
        ) from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise PolybitError(f"{name} has no span head (it lacks {missing[-1]!r:.80}): give a model trained on SQuAD")
    check_weights(model, name)
    return model.eval(), load_tokenizer(name)


def with_new_head(name: str) -> tuple[nn.Module, Any]:
    """A causal language model's body under a random span head."""
    from transformers import AutoModelForQuestionAnswering

    causal, tokenizer = load_float(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # whoever asks, in any process, has the same head
            model: Any = AutoModelForQuestionAnswering.from_config(causal.config, dtype=torch.float32)
    except ValueError as error:
        raise PolybitError(
            f"{name} cannot be given a span head ({first_line(error)}): give a model that can have one, "
            "such as GPT-2 or Llama"
        ) from error
    body: Any = causal.base_model
    model.base_model.load_state_dict(body.state_dict())  # the bodies' names differ, their weights do not
    return model.eval(), tokenizer


class SpanReader:
    """The view an evaluation has of a span model: scores of every token as start and as end."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_tokens: int = 8192) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_tokens, self.max_length = batch_tokens, longest_input(model)

    @contextmanager
    def at(self, preset: str | None) -> Iterator[SpanReader]:
        """Read the model at a preset inside the block; None leaves its precision alone."""
        with nullcontext() if preset is None else switch.at(self.model, preset):
            yield self

    @torch.inference_mode()
    def scores(self, rows: Sequence[Sequence[int]], label: str = "spans") -> list[tuple[Tensor, Tensor]]:
        """(start scores, end scores), float32 [T] each, of every row of token ids."""
        device = next(self.model.parameters()).device
        found: list[tuple[Tensor, Tensor] | None] = [None] * len(rows)
        for group in track(buckets([len(row) for row in rows], tokens=self.batch_tokens), label):
            ids_BT, mask_BT = pad([rows[index] for index in group], self.tokenizer.pad_token_id or 0)
            out = self.model(input_ids=ids_BT.to(device), attention_mask=mask_BT.long().to(device))
            for line, index in enumerate(group):
                length = len(rows[index])
                start, end = out.start_logits[line, :length], out.end_logits[line, :length]
                found[index] = start.float().cpu(), end.float().cpu()
        return [pair for pair in found if pair is not None]
