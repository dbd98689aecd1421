"""Objectives that train several precisions of one model together: who learns from the data, and who from whom.

A batch is a mapping with ids_BT, mask_BT (True at real tokens) and learn_BT (True at the tokens that are to be said).
All losses are means over the learnt tokens, in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from polybit.core.runtime import PolybitError
from polybit.train.forward import logits_of
from polybit.train.table import Distance, LessonKnobs

Forward = Callable[[Mapping[str, Tensor], str], Tensor]
Batch = Mapping[str, Tensor]
Logs = dict[str, float | Tensor]
Pose = Callable[[Batch], tuple[dict[str, Tensor], Tensor]]
FLOAT = "float"  # the preset name of the float model


def distance_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(teacher ‖ student), mean over tokens, nats; the teacher gets no gradient."""
    wanted_NV = log_softmax(teacher_NV.detach().float(), -1)
    given_NV = log_softmax(student_NV.float(), -1)
    return (wanted_NV.exp() * (wanted_NV - given_NV)).sum(-1).mean()


def distance_mse(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Mean squared difference of the logits; the teacher gets no gradient."""
    return (student_NV.float() - teacher_NV.detach().float()).square().mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": distance_kl, "mse": distance_mse}


@dataclass(slots=True)
class Cascade:
    """Losses of the presets of a step, by who teaches whom; presets come most precise first.

    cdt: data, and every more precise preset of the step teaches (InstantNet, arXiv 2104.10853, eq. 1) · sp: data, and
    the most precise one teaches all (SP-Net, arXiv 2002.02809) · recursive: only the most precise learns from the data,
    each other one from the next more precise (Any-Precision DNN, arXiv 1911.07346) · joint: data only · independent:
    data and the float model, one preset alone. With `teacher` the float model is the most precise of all: a teacher
    that is not trained. Unlike InstantNet, whose presets are the only teachers, and whose distance is the mean squared
    difference of logits: over a large vocabulary that is next to nothing, so the default is KL.

    beta: weight of a teacher beside the data · data: weight of the data. The distillation terms of a preset are
    averaged over its teachers with `average`, else added as in the paper. A preset's loss depends on the others through
    logits without gradient, so that presets may run one after another (`separable`): logits are kept while the batch is
    the same. pose: what forward gets of a batch, and the right classes of the rows it gives (default: `answer_part`).
    source: the float model as a model of its own, needed when what its preset shares with the others is trained too.
    """

    method: str = "cdt"
    distance: Distance = "kl"
    beta: float = 1.0
    data: float = 1.0
    teacher: bool = True
    average: bool = False
    separable: bool = True
    pose: Pose | None = None
    source: nn.Module | None = None
    batch: object = None
    said: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, forward: Forward, batch: Batch, presets: tuple[str, ...]) -> tuple[Tensor, Logs]:
        """Sum of the presets' losses, and each preset's parts for the log."""
        if self.batch is not batch:
            self.batch, self.said = batch, {}
        part, target_N = (self.pose or answer_part)(batch)
        if self.teacher and self.method != "joint" and FLOAT not in self.said:
            with torch.no_grad():
                self.said[FLOAT] = forward(part, FLOAT) if self.source is None else logits_of(self.source, part)
        total = torch.zeros((), device=target_N.device)
        logs: Logs = {}
        for name in presets:
            logits_NV = forward(part, name)
            teachers = self.teachers()
            self.said[name] = logits_NV.detach()
            loss, parts = self.one(logits_NV, target_N, teachers)
            total = total + loss
            logs |= {f"{name}/{key}": value for key, value in parts.items()}
        return total, logs

    def teachers(self) -> list[str]:
        """Who teaches the next preset, among those that have spoken on this batch."""
        spoken = list(self.said)
        if self.method == "cdt":
            return spoken
        if self.method in ("sp", "independent"):
            return spoken[:1] if self.method == "sp" or self.teacher else []
        return spoken[-1:] if self.method == "recursive" else []

    def one(self, logits_NV: Tensor, target_N: Tensor, teachers: list[str]) -> tuple[Tensor, Logs]:
        """Loss of one preset and its parts."""
        parts: Logs = {}
        loss = logits_NV.new_zeros((), dtype=torch.float32)
        if self.data and (self.method != "recursive" or not teachers):
            nll = cross_entropy(logits_NV.float(), target_N)
            loss = loss + self.data * nll
            parts["nll"] = nll.detach()
        if teachers:
            measure = DISTANCES[self.distance]
            terms = torch.stack([measure(logits_NV, self.said[name]) for name in teachers])
            loss = loss + self.beta * (terms.mean() if self.average else terms.sum())
            parts[self.distance] = terms.detach().mean()
        return loss, parts


def answer_part(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """(what forward needs, with keep_BT at the positions that predict a learnt token; those tokens [N])."""
    learn_BT = batch["learn_BT"].bool()
    keep_BT = torch.zeros_like(learn_BT)
    keep_BT[:, :-1] = learn_BT[:, 1:]
    if not bool(keep_BT.any()):
        raise PolybitError("a batch has no token to learn: give texts with answers, of at least two tokens")
    target_N = batch["ids_BT"][:, 1:][learn_BT[:, 1:]]
    part = {name: tensor for name, tensor in batch.items() if name != "learn_BT"}
    return {**part, "keep_BT": keep_BT}, target_N


def built(method: str, knobs: LessonKnobs) -> Cascade:
    """A cascade as the flags say."""
    return Cascade(
        method, knobs.distance, knobs.beta, knobs.data, teacher=knobs.teacher, source=knobs.source, pose=knobs.pose
    )


def cdt(knobs: LessonKnobs) -> Cascade:
    """`--method cdt`."""
    return built("cdt", knobs)


def joint(knobs: LessonKnobs) -> Cascade:
    """`--method joint`."""
    return built("joint", knobs)


def sp(knobs: LessonKnobs) -> Cascade:
    """`--method sp`."""
    return built("sp", knobs)


def recursive(knobs: LessonKnobs) -> Cascade:
    """`--method recursive`."""
    return built("recursive", knobs)


def independent(knobs: LessonKnobs) -> Cascade:
    """`--method independent`."""
    return built("independent", knobs)


@dataclass(slots=True)
class Agreement:
    """Further terms beside any objective, the seed's three; each is 0 where it has nothing to compare.

    consistency: KL between the presets, both ways, mean over pairs, with gradient in both · alignment: relative
    squared difference of the hidden states after every block, each preset against the most precise one, which gets no
    gradient · switchability: squared distance between the adapters of two presets over their squared size, mean over
    pairs and layers. Needs all presets of a step at once, so it is not separable.
    """

    inner: Cascade
    model: nn.Module
    consistency: float = 0.0
    alignment: float = 0.0
    switchability: float = 0.0
    separable: bool = False

    def __call__(self, forward: Forward, batch: Batch, presets: tuple[str, ...]) -> tuple[Tensor, Logs]:
        """The inner loss plus the weighted terms."""
        logits: dict[str, Tensor] = {}
        states: dict[str, list[Tensor]] = {}

        def listening(part: Batch, name: str) -> Tensor:
            with hidden_states(self.model) if self.alignment else nothing() as heard:
                found = forward(part, name)
            if name in presets:
                logits[name] = found
                states[name] = heard
            return found

        loss, logs = self.inner(listening, batch, presets)
        terms = {
            "consistency": (self.consistency, lambda: consistency(list(logits.values()))),
            "alignment": (self.alignment, lambda: alignment(list(states.values()))),
            "switchability": (self.switchability, lambda: switchability(adapters_of(self.model, presets))),
        }
        for name, (weight, term) in terms.items():
            if weight:
                value = term().to(loss.device)
                loss, logs[name] = loss + weight * value, value.detach()
        return loss, logs


def consistency(logits: list[Tensor]) -> Tensor:
    """Mean over pairs of presets of (KL(p ‖ q) + KL(q ‖ p)) / 2, nats per token."""
    if len(logits) < 2:
        return torch.zeros(())
    logs = [log_softmax(l_NV.float(), -1) for l_NV in logits]
    terms = [0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() for n, p in enumerate(logs) for q in logs[n + 1 :]]
    return torch.stack(terms).mean()


def alignment(states: list[list[Tensor]]) -> Tensor:
    """Mean over presets and blocks of ‖h - h_top‖² / ‖h_top‖², against the first (most precise) preset."""
    if len(states) < 2 or not states[0]:
        return torch.zeros(())
    terms = [
        (h - top.detach()).square().mean() / top.detach().square().mean().clamp_min(1e-12)
        for other in states[1:]
        for h, top in zip(other, states[0], strict=True)
    ]
    return torch.stack(terms).mean()


def switchability(adapters: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """Mean over pairs of presets and layers of ‖B A - B' A'‖² / (‖B A‖² + ‖B' A'‖²); 0 where both are zero.

    adapters: preset -> layer -> (A_RI, B_OR). Only r x r products are made: ‖B A‖² = tr(BᵀB A Aᵀ).
    """

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        return ((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum()

    terms = []
    for n, first in enumerate(adapters):
        for second in adapters[n + 1 :]:
            for a, b in zip(first, second, strict=True):
                sizes = inner(a, a) + inner(b, b)
                terms.append((sizes - 2 * inner(a, b)) / sizes.clamp_min(1e-12))
    return torch.stack(terms).mean() if terms else torch.zeros(())


def adapters_of(model: nn.Module, presets: tuple[str, ...]) -> list[list[tuple[Tensor, Tensor]]]:
    """The factors of every preset's plain adapters, layer by layer."""
    tables: list[Any] = [module.loras for module in model.modules() if hasattr(module, "loras")]
    return [[(t[name].down_RI, t[name].up_OR) for t in tables if name in t] for name in presets]


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the output of every decoder block of the forward passes of the body."""
    heard: list[Tensor] = []

    def listen(module: nn.Module, inputs: Any, output: Any) -> None:
        heard.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(listen) for block in decoder_blocks(model)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def nothing() -> Iterator[list[Tensor]]:
    """Collects nothing."""
    yield []


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks: the longest list of modules of one type."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise PolybitError("hidden states can only be aligned in a model with a list of decoder blocks")
    return max(lists, key=len)
