"""Which widths `polybit align` trains, which it keeps, and the trainable model for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.commands.pairs import Models, warn
from polybit.core.runtime import PolybitError

NARROW = 4  # wider ones answer like the float model already: by default they are kept, not trained
WINDOWS, LENGTH = 64, 128  # of prompts and answers, for settling the widths that are kept


@dataclass(frozen=True)
class Widths:
    """presets: name -> Plan of every width of the file to be · trained: those that are trained, widest first · chained:
    whether each has a latent weight of its own in one code."""

    presets: Mapping[str, Any]
    trained: tuple[str, ...]
    chained: bool

    @property
    def kept(self) -> tuple[str, ...]:
        """Widths of the file that are not trained."""
        return tuple(name for name in self.presets if name not in self.trained)

    @property
    def bits(self) -> tuple[int, ...]:
        """The trained widths as numbers."""
        return tuple(self.presets[name].default.w for name in self.trained)

    def allowed(self, nats: float) -> dict[str, float]:
        """What every kept width may lose."""
        return dict.fromkeys(self.kept, nats)


def precision_names(precision: str | None) -> list[str]:
    """The precisions asked for, widest first; only weights can be aligned."""
    from polybit.core.precision import FLOAT, Precision

    names = [part.strip() for part in (precision or "").split(",") if part.strip()]
    for name in names:
        found = Precision.parse(name)
        if found.w == FLOAT or found != Precision(w=found.w):
            raise PolybitError(f"--precision {name} cannot be aligned: give weight widths w2 to w8, as in w3 or w4,w3")
    return sorted(set(names), key=lambda name: -Precision.parse(name).w)


def choose(config, models: Models, noted: Mapping[str, Any]) -> Widths:
    """The widths of a run. A nested checkpoint keeps all it has; a fixed one and a float model have those asked for.

    noted: what `polybit pairs` said about the pairs.
    """
    from polybit.compress.sizes import stored_widths
    from polybit.core.plan import Plan
    from polybit.hub.load import load_quantized

    names = precision_names(config.precision)
    stored: list[str] = []
    if models.checkpoint is not None:
        stored = [f"w{b}" for b in stored_widths(load_quantized(models.checkpoint)[0]) or ()]
        unknown = [name for name in names if stored and name not in stored]
        if unknown:
            raise PolybitError(
                f"{models.checkpoint} does not hold {', '.join(unknown)}: align {', '.join(stored)} or make another"
            )
    if not names:
        narrow = [name for name in stored if int(name[1:]) <= NARROW]
        names = narrow or stored or [str(noted["precision"])]
    if config.adapter == "nested" and len(names) > 1:
        raise PolybitError(
            "--adapter nested gives every width weights of its own: align one width at a time, or use --adapter none"
        )
    if config.method.startswith("qdpo") and config.refresh_every == 0 and names != [noted["precision"]]:
        warn(f"the pairs are of {noted['precision']}, not of {', '.join(names)}: answers are only renewed with refresh")
    chained = config.adapter == "none" and config.latents == "own" and max(len(stored), len(names)) > 1
    if chained and config.scales not in (None, "frozen"):
        raise PolybitError(
            f"--scales {config.scales} moves what all widths of the file share: leave it out, or add --latents shared"
        )
    every = sorted({*stored, *names}, key=lambda name: -int(name[1:])) if chained else names
    return Widths({name: Plan.uniform(name) for name in every}, tuple(names), chained)


def statistics(model, widths: Widths, rows: list[list[int]]):
    """What calibration sees of the float model at every layer, from prompts and their answers; {} where nothing kept
    will be settled."""
    import torch

    from polybit.compress.stats import collect
    from polybit.nn.convert import targets

    wider = [name for name in widths.kept if widths.presets[name].default.w > max(widths.bits)]
    if not (widths.chained and wider):
        return {}
    joined = torch.tensor([token for row in rows for token in row][: WINDOWS * LENGTH])
    length = min(LENGTH, len(joined))
    ids_NT = joined[: len(joined) // length * length].view(-1, length)
    kinds = [target for target in targets(model) if target.kind != "embedding"]
    return collect(model, list(ids_NT.split(8)), kinds)


def make(model, models: Models, widths: Widths, config):
    """The trainable model: the float weights inside the cells of the checkpoint's codes, or of a plain rounding."""
    from polybit.train.latent import Freedom, Scales, make_trainable

    start = None if models.checkpoint is None else start_codes(models.checkpoint, config)
    plain: Scales = "recomputed" if start is None and len(widths.presets) == 1 else "learned"
    scales: Scales = config.scales or ("frozen" if widths.chained else plain)
    return make_trainable(
        model,
        widths.presets,
        start=start,
        group_size=config.group_size,
        zero="group",
        adapter=config.adapter,
        freedom=Freedom(
            scales=scales,
            base=config.adapter == "none",
            rank=config.rank,
            # a checkpoint's codes are compensated: latents at the borders of their cells would undo that in a few steps
            margin=0.0 if start is None else 0.5,
            chained=widths.bits if widths.chained else (),
        ),
    )


def start_codes(checkpoint: str | Path, config) -> dict[str, Any]:
    """The codes of a checkpoint's layers; one that quantizes more than linear layers is refused."""
    from polybit.compress.sizes import quantized_layers
    from polybit.core.planes import unpack
    from polybit.hub.load import load_quantized
    from polybit.nn.linear import QuantLinear

    quantized, _ = load_quantized(str(checkpoint), trust_remote_code=config.trust_remote_code)
    start = {n: unpack(m.planes) for n, m in quantized.named_modules() if isinstance(m, QuantLinear)}
    left = set(quantized_layers(quantized)) - set(start)
    if left:
        raise PolybitError(
            f"{checkpoint} quantizes {min(left)!r:.120}, which is no linear layer and cannot be trained: "
            "make the checkpoint without --include-embeddings, from a model without fused experts"
        )
    return start


def settle(model, widths: Widths, stats, held_out, outcome) -> dict[str, dict[str, float]]:
    """Choose the bits that only kept widths read again, and measure those widths; {} where there are none, or where
    they were nearer to the float model before, which is then restored."""
    from polybit.train.chain import Chain
    from polybit.train.latent import latent_layers
    from polybit.train.latent import settle as settle_bits
    from polybit.train.probe import AnswerProbe, forget

    if not stats or outcome.best is outcome.start:
        return {}
    chains = [code for layer in latent_layers(model).values() for code in layer.codes.values()]
    before = [(code, code.start_OI) for code in chains if isinstance(code, Chain)]
    settle_bits(model, stats)
    found = {name: dict(numbers) for name, numbers in AnswerProbe(held_out, widths.kept)(model).items()}
    if sum(numbers["kl"] for numbers in found.values()) > sum(outcome.best[name]["kl"] for name in found):
        for code, start_OI in before:
            code.start_OI = start_OI
        found = {}
    forget(model)
    return found
