"""Training a span head at several presets: where in a text an answer begins and where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.data.batches import pad
from polybit.nn.switch import at, use
from polybit.train.cascade import FLOAT
from polybit.train.fit import Course, Outcome, Teaching, fit
from polybit.train.picker import Probed
from polybit.train.schedules import every
from polybit.train.switchable import grouped_order
from polybit.train.table import Schedule

HEAD = "qa_outputs"  # the name transformers gives the span head of every family
NEVER = -1e4  # score of padding


@dataclass(frozen=True, slots=True)
class SpanRow:
    """Token ids of one window, and the first and the last token of the answer (0, 0 = not in this window)."""

    ids: Sequence[int]
    first: int
    last: int


class SpanScores(nn.Module):
    """A span model seen as a classifier: logits [2 B, T], the starts of all rows and then their ends."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Scores of every token, padding out of reach."""
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        both_NT = torch.cat([out.start_logits, out.end_logits])
        real_NT = torch.cat([attention_mask, attention_mask]).bool()
        return SimpleNamespace(logits=both_NT.masked_fill(~real_NT, NEVER))


def float_head(presets: Mapping[str, Plan]) -> dict[str, Plan]:
    """The presets with the span head left in float: it is two rows."""
    return {
        name: Plan(plan.default, {**plan.layers, HEAD: Precision()}, plan.columns) for name, plan in presets.items()
    }


def pose(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What forward reads of a batch, and the right token of each row of its scores [2 B]."""
    return {name: batch[name] for name in ("ids_BT", "mask_BT")}, torch.cat([batch["first_B"], batch["last_B"]])


def batch_of(rows: Sequence[SpanRow], fill: int) -> dict[str, Tensor]:
    """ids_BT, mask_BT, first_B, last_B."""
    ids_BT, mask_BT = pad([row.ids for row in rows], fill)
    first_B, last_B = (torch.tensor([getattr(row, name) for row in rows]) for name in ("first", "last"))
    return {"ids_BT": ids_BT, "mask_BT": mask_BT.long(), "first_B": first_B, "last_B": last_B}


@dataclass(frozen=True)
class SpanProbe:
    """Held-out windows read at every preset."""

    rows: Sequence[SpanRow]
    presets: tuple[str, ...]
    fill: int

    @torch.no_grad()
    def __call__(self, scores: nn.Module) -> Probed:
        """nll: nats per place (start and end) · wrong: share of wrong places · kl: to the float model, nats."""
        inner: Any = scores.inner
        device = next(inner.parameters()).device
        found: dict[str, dict[str, float]] = {}
        sums = {name: torch.zeros(3, dtype=torch.float64) for name in self.presets}
        for start in range(0, len(self.rows), 16):
            batch = batch_of(self.rows[start : start + 16], self.fill)
            part, target_N = pose({name: tensor.to(device) for name, tensor in batch.items()})
            given = {"input_ids": part["ids_BT"], "attention_mask": part["mask_BT"]}
            with at(inner, FLOAT):
                wanted_NT = log_softmax(scores(**given).logits.float(), -1)
            for name in self.presets:
                with at(inner, name):
                    logits_NT = scores(**given).logits.float()
                nll = cross_entropy(logits_NT, target_N, reduction="sum")
                wrong = (logits_NT.argmax(-1) != target_N).sum()
                kl = (wanted_NT.exp() * (wanted_NT - log_softmax(logits_NT, -1))).sum()
                sums[name] += torch.stack([nll.double(), wrong.double(), kl.double()]).cpu()
        for name, total in sums.items():
            found[name] = dict(zip(("nll", "wrong", "kl"), (total / (2 * len(self.rows))).tolist(), strict=True))
        return found


def run_spans(
    model: nn.Module,
    rows: Sequence[SpanRow],
    held_out: Sequence[SpanRow],
    objective: Any,
    presets: Sequence[str],
    *,
    out: Path,
    course: Course,
    schedule: Schedule = every,
    fill: int = 0,
) -> Outcome:
    """Train a span model made by make_trainable where it is, its head too, and leave its best weights in it; resumes
    in `out`.

    The head is trained for all presets together. Without it the float preset could not answer either, so it teaches
    only what it has learnt so far. Raises PolybitError for rows of which none holds an answer.
    """
    if not any(row.last for row in rows):
        raise PolybitError("no window of the data holds an answer: give questions with answers, or a longer --length")
    head: Any = model.get_submodule(HEAD)
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    scores = SpanScores(model)
    teaching = Teaching(
        order=grouped_order([len(row.ids) for row in rows], course.steps, course.batch, seed=course.seed),
        gather=lambda chosen, step: batch_of([rows[row] for row in chosen], fill),
        objective=objective,
        presets=presets,
        schedule=schedule,
        switch=lambda core, name: use(core.inner, name),  # type: ignore[arg-type]
        probe=SpanProbe(held_out, tuple(presets), fill),
    )
    return fit(scores, teaching, course, out=out)
