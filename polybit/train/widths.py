"""Which widths of a file an alignment trains, which it keeps, and the trainable model for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from polybit.core.affine import QWeight
from polybit.core.plan import Plan, largest_width
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.train.chain import Chain
from polybit.train.fit import Outcome
from polybit.train.latent import Freedom, latent_layers, make_trainable
from polybit.train.latent import settle as settle_bits
from polybit.train.material import PairMaterial
from polybit.train.probe import AnswerProbe, forget
from polybit.train.straight import Scales

NARROW = 4  # wider ones answer like the float model already: by default they are kept, not trained
CLEAR = 0.05  # codes between a weight and the border of its cell at the start from a float model (Freedom.margin)
INSIDE = 0.1  # the same from a checkpoint; nearer to the middle, short runs do not carry a weight out of its cell


@dataclass(frozen=True)
class FileWidths:
    """presets: name -> Plan of every width of the file to be, or its plan where it was made by one · trained: those
    that are trained, widest first · chained: whether each has a latent weight of its own in one code · plans: others
    the file has beside its widths, which stay."""

    presets: Mapping[str, Plan]
    trained: tuple[str, ...]
    chained: bool
    plans: Mapping[str, Plan] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[str, ...]:
        """Widths of the file that are not trained."""
        return tuple(name for name in self.presets if name not in self.trained)

    @property
    def bits(self) -> tuple[int, ...]:
        """The trained widths as numbers."""
        return tuple(self.presets[name].default.w for name in self.trained)

    @property
    def stored(self) -> tuple[int, ...]:
        """All widths as numbers, widest first; of a plan its widest layer's."""
        return tuple(sorted({largest_width(plan) for plan in self.presets.values()}, reverse=True))

    @property
    def plain(self) -> tuple[int, ...]:
        """Those of them that every layer has."""
        return tuple(bits for bits in self.stored if f"w{bits}" in self.presets)

    @property
    def named(self) -> dict[str, Plan]:
        """The plans of the file to be."""
        there = {f"w{bits}" for bits in self.plain}
        return {name: plan for name, plan in self.presets.items() if name not in there} | dict(self.plans)

    @property
    def settled(self) -> bool:
        """Whether there are kept widths wider than all trained ones, whose own bits may be chosen again."""
        return self.chained and any(self.presets[name].default.w > max(self.bits) for name in self.kept)

    def allowed(self, nats: float) -> dict[str, float]:
        """What every kept width may lose."""
        return dict.fromkeys(self.kept, nats)


def widths_of(
    asked: Sequence[str],
    stored: Sequence[int],
    plans: Mapping[str, Plan],
    pairs_at: str,
    *,
    adapter: Literal["none", "nested"],
    latents: Literal["own", "shared"],
    scales: Scales | None,
) -> FileWidths:
    """The widths of a run. A nested checkpoint keeps all it has; a fixed one and a float model have those asked for;
    one made by a plan has that.

    asked: names, widest first; none = the narrow ones stored, or that of the pairs · stored: widths that all layers of
    the checkpoint have, none for a float model · plans: its plans · pairs_at: the precision the pairs were made at.
    """
    by_plan = bool(plans) and not stored
    there = list(plans) if by_plan else [f"w{bits}" for bits in stored]
    unknown = [name for name in asked if there and name not in there]
    if unknown:
        raise PolybitError(
            f"the checkpoint does not hold {', '.join(unknown)}: align {', '.join(there)} or make another"
        )
    if by_plan:
        chosen = tuple(asked) or tuple(plans)
        return FileWidths({name: plans[name] for name in chosen}, chosen, chained=False)
    narrow = [name for name in there if int(name[1:]) <= NARROW]
    names = list(asked) or narrow or there or [pairs_at]
    if adapter == "nested" and len(names) > 1:
        raise PolybitError(
            "--adapter nested gives every width weights of its own: align one width at a time, or use --adapter none"
        )
    chained = adapter == "none" and latents == "own" and max(len(there), len(names)) > 1
    if chained and scales not in (None, "frozen"):
        raise PolybitError(
            f"--scales {scales} moves what all widths of the file share: leave it out, or add --latents shared"
        )
    every = sorted({*there, *names}, key=lambda name: -int(name[1:])) if chained else names
    return FileWidths({name: Plan.uniform(name) for name in every}, tuple(names), chained, plans if chained else {})


def trainable_of(
    model: nn.Module,
    widths: FileWidths,
    start: Mapping[str, QWeight] | None,
    *,
    group_size: int,
    adapter: Literal["none", "nested"],
    rank: int,
    scales: Scales | None,
) -> nn.Module:
    """The trainable model: the float weights inside the cells of the start's codes, or of a plain rounding."""
    plain: Scales = "recomputed" if start is None and len(widths.presets) == 1 else "learned"
    return make_trainable(
        model,
        widths.presets,
        start=start,
        group_size=group_size,
        zero="group",
        adapter=adapter,
        freedom=Freedom(
            scales=scales or ("frozen" if widths.chained else plain),
            base=adapter == "none",
            rank=rank,
            # a checkpoint's codes are compensated: latents at the borders of their cells would undo that in few steps;
            # a float model may have been quantized before, and then has its weights on borders
            margin=CLEAR if start is None else INSIDE,
            chained=widths.bits if widths.chained else (),
        ),
    )


def settle_kept(
    model: nn.Module, kept: tuple[str, ...], stats: Mapping[str, LayerStats], held_out: PairMaterial, outcome: Outcome
) -> dict[str, dict[str, float]]:
    """Choose the bits that only kept widths read again, and measure those widths.

    {} where nothing was trained or there are no statistics, and where the kept widths were nearer to the float model
    before, which is then restored.
    """
    if not stats or outcome.best is outcome.start:
        return {}
    chains = [code for layer in latent_layers(model).values() for code in layer.codes.values()]
    before = [(code, code.start_OI) for code in chains if isinstance(code, Chain)]
    settle_bits(model, stats)
    found = {name: dict(numbers) for name, numbers in AnswerProbe(held_out, kept)(model).items()}
    if sum(numbers["kl"] for numbers in found.values()) > sum(outcome.best[name]["kl"] for name in found):
        for code, start_OI in before:
            code.start_OI = start_OI
        found = {}
    forget(model)
    return found
