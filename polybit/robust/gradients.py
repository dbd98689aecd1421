"""A model as an attacker sees it: the loss of the right answers, and its gradient with respect to the input tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.runtime import PolybitError
from polybit.data.batches import buckets, pad
from polybit.hub.lm import LocalLM
from polybit.nn import switch
from polybit.nn.linear import QuantEmbedding
from polybit.robust.cases import Case


@contextmanager
def nudged(model: nn.Module, delta_BTD: Tensor) -> Iterator[None]:
    """Add `delta_BTD` to the embeddings of the input during the body, whatever form the model takes its input in."""
    handle = embedding_of(model).register_forward_hook(lambda _, __, output: output + delta_BTD.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


def embedding_of(model: nn.Module) -> nn.Module:
    """The module that looks input tokens up."""
    ask: Any = getattr(model, "get_input_embeddings", None)
    module = ask() if ask else None
    if not isinstance(module, nn.Module):
        raise PolybitError(
            f"{type(model).__name__} shows no input embeddings, so no gradient reaches its input: attack a model of "
            "transformers that runs in this process"
        )
    return module


def embedding_matrix(model: nn.Module) -> Tensor:
    """The embedding of every token at the current precision, float32 [V, D], no gradient."""
    module = embedding_of(model)
    if isinstance(module, QuantEmbedding):
        return module.decode()
    weight: Any = module.weight
    return weight.detach().float()


class Victim:
    """One model at one or several precisions, attacked through the mean over them (expectation over the draw, EOT).

    Quantized layers are read as dequantized weights, through which gradients pass; activations and attention operands
    are rounded with straight-through gradients.
    """

    def __init__(self, lm: LocalLM, presets: Sequence[str | None]) -> None:
        if not presets:
            raise PolybitError("an attack needs at least one precision to look at")
        self.lm, self.presets = lm, list(presets)

    @contextmanager
    def at(self, preset: str | None) -> Iterator[None]:
        """The model at a preset, its weights dequantized."""
        quantized = preset is not None or any(isinstance(m, QuantEmbedding) for m in self.lm.model.modules())
        with ExitStack() as stack:
            if preset is not None:
                stack.enter_context(switch.at(self.lm.model, preset))
            if quantized or is_quantized(self.lm.model):
                stack.enter_context(switch.keep_decoded(self.lm.model))
            yield

    def batches(self, cases: Sequence[Case]) -> list[list[int]]:
        """Case numbers by batches of similar length."""
        lengths = [len(case.ids) + len(case.answer) for case in cases]
        rows = self.lm.rows_per_batch(max(lengths))
        return buckets(lengths, tokens=self.lm.batch_tokens, rows=rows)

    def nll(self, cases: Sequence[Case]) -> Tensor:
        """Nats per token of the right answer of each row, float32 [B]; with gradient where that is enabled."""
        ids_BT, mask_BT = pad([[*case.ids, *case.answer] for case in cases], self.lm.pad_token())
        device = self.lm.device
        places = [(row, len(case.ids) + n) for row, case in enumerate(cases) for n in range(len(case.answer))]
        row_N, place_N = torch.tensor(places, device=device).T
        share_N = torch.tensor([1 / len(case.answer) for case in cases for _ in case.answer], device=device)
        ids_BT = ids_BT.to(device)
        logits_BTV = self.lm.model(input_ids=ids_BT, attention_mask=mask_BT.long().to(device), use_cache=False).logits
        logp_NV = logits_BTV[row_N, place_N - 1].float().log_softmax(-1)
        nll_N = -logp_NV.gather(-1, ids_BT[row_N, place_N, None])[:, 0]
        return torch.zeros(len(cases), device=device).index_add(0, row_N, nll_N * share_N)

    @torch.no_grad()
    def losses(self, cases: Sequence[Case]) -> Tensor:
        """Nats per answer token of each case, mean over the precisions, float32 [N] on the CPU."""
        total = torch.zeros(len(cases))
        for preset in self.presets:
            with self.at(preset):
                for group in self.batches(cases):
                    total[group] += self.nll([cases[n] for n in group]).cpu()
        return total / len(self.presets)

    def gains(self, cases: Sequence[Case]) -> tuple[Tensor, list[Tensor]]:
        """(losses [N], for each case the first-order gain of each token at each free position, float32 [P, V]).

        HotFlip (Ebrahimi et al., ACL 2018, eq. 6): gradient of the loss times the change of the embedding.
        Raises PolybitError for a model through which no gradient passes.
        """
        losses = torch.zeros(len(cases))
        gains: list[Any] = [0.0] * len(cases)
        for preset in self.presets:
            with self.at(preset):
                matrix_VD = embedding_matrix(self.lm.model)
                for group in self.batches(cases):
                    rows = [cases[n] for n in group]
                    nll_B, gradient_BTD = self.gradient(rows)
                    losses[group] += nll_B.cpu() / len(self.presets)
                    for line, (n, case) in enumerate(zip(group, rows, strict=True)):
                        slope_PD = gradient_BTD[line, list(case.free)]
                        now_P1 = (slope_PD * matrix_VD[list(case.tokens)]).sum(-1, keepdim=True)
                        gains[n] = gains[n] + (slope_PD @ matrix_VD.T - now_P1).cpu() / len(self.presets)
        return losses, gains

    def gradient(self, rows: Sequence[Case]) -> tuple[Tensor, Tensor]:
        """Loss of each row, and its gradient with respect to the row's input embeddings [B, T, D]."""
        length = max(len(case.ids) + len(case.answer) for case in rows)
        width = embedding_matrix(self.lm.model).shape[1]
        delta_BTD = torch.zeros(len(rows), length, width, device=self.lm.device, requires_grad=True)
        with torch.enable_grad(), nudged(self.lm.model, delta_BTD):
            nll_B = self.nll(rows)
            gradient = (
                torch.autograd.grad(nll_B.sum(), delta_BTD, allow_unused=True)[0] if nll_B.requires_grad else None
            )
        if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            raise PolybitError(
                f"no gradient reaches the input of {type(self.lm.model).__name__}: attack a float model or a polybit "
                "checkpoint, whose weights can be dequantized"
            )
        return nll_B.detach(), gradient


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has layers whose decoded weights can be kept."""
    return any(hasattr(module, "keep") and hasattr(module, "decode") for module in model.modules())
