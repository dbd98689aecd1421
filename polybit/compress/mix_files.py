"""Mixtures of texts on their way in: a `--mix` read into shares, and calibration windows drawn by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.compress.text import HELD_OUT, Calibration, gather
from polybit.core.runtime import PolybitError
from polybit.hub.files import read_json

LARGEST_SHARE = 1e9  # shares are relative; the sum of all must stay a number


def read_mix(spec: str) -> dict[str, float]:
    """Read `stories.txt=0.25,gsm8k.jsonl=0.75`, or the .json that `polybit mix --json` wrote, into shares by text."""
    if spec.endswith(".json"):
        return read_found(Path(spec))
    shares: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in spec.split(","))):
        source, sign, share = part.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not (sign and source) or source in shares or not 0 <= value <= LARGEST_SHARE:
            raise PolybitError(
                f"--mix {spec!r:.120} cannot be read at {part!r:.60}: give every text once with its share, as in "
                "--mix stories.txt=0.25,gsm8k.jsonl=0.75"
            )
        shares[source] = value
    if sum(shares.values()) <= 0:
        raise PolybitError(f"--mix {spec!r:.120} gives no text a share: write as in stories.txt=0.25,gsm8k.jsonl=0.75")
    return {source: share for source, share in shares.items() if share > 0}


def read_found(path: Path) -> dict[str, float]:
    """The shares that `polybit mix` found, of the .json that it wrote."""
    found: Any = read_json(path) if path.is_file() else None
    for key in ("numbers", "mixture", "best", "weights"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise PolybitError(f"--mix {path}: this is no file that polybit mix --json wrote; write FILE=SHARE,FILE=SHARE")
    for source, share in found.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= LARGEST_SHARE:
            raise PolybitError(
                f"--mix {path} gives {source!r:.120} the share {share!r:.40}: each is a number from 0 to "
                f"{LARGEST_SHARE:g}"
            )
    shares = {source: float(share) for source, share in found.items() if share > 0}
    if not shares:
        raise PolybitError(f"--mix {path} gives no text a share: run polybit mix again")
    return shares


def gather_either(
    model: Any,
    tokenizer: Any,
    source: str,
    mixture: str | None,
    *,
    samples: int,
    length: int,
    seed: int,
    held_out: int = HELD_OUT,
    embedded: bool = False,
) -> Calibration:
    """Calibration text from a mixture where one was asked for, else from one source."""
    if mixture is not None:
        return gather_mixture(model, tokenizer, mixture, samples=samples, length=length, seed=seed)
    return gather(
        model, tokenizer, source, samples=samples, held_out=held_out, length=length, seed=seed, embedded=embedded
    )


def gather_mixture(model: Any, tokenizer: Any, spec: str, *, samples: int, length: int, seed: int) -> Calibration:
    """Calibration windows drawn by the shares of `spec`, and held-out windows in the same shares."""
    shares = read_mix(spec)
    counts = dict(zip(shares, whole_shares(list(shares.values()), samples), strict=True))
    parts = {}
    for source, count in counts.items():
        if count:
            with about(source):
                parts[source] = gather(model, tokenizer, source, samples=count, length=length, seed=seed)
    short = [source for source, part in parts.items() if len(part.windows_NT) < counts[source]]
    if short:
        raise PolybitError(
            f"--mix asks for {counts[short[0]]} windows of {short[0]!r}, which gives "
            f"{len(parts[short[0]].windows_NT)}: give a longer text, a shorter --window or fewer --samples"
        )
    used = {source: shares[source] for source in parts}
    least = min(len(part.held_out_MT) / shares[source] for source, part in parts.items())
    held_out = max(1, int(least * sum(used.values())))
    mixed_NT = draw(
        {s: p.windows_NT for s, p in parts.items()}, {s: float(counts[s]) for s in parts}, samples, seed=seed
    )
    held_MT = draw({s: p.held_out_MT for s, p in parts.items()}, used, min(held_out, 32), seed=seed)
    return Calibration(mixed_NT, held_MT, ",".join(f"{source}={share:g}" for source, share in shares.items()))


@contextmanager
def about(source: str) -> Iterator[None]:
    """Name the text in what is said against it: there are several."""
    try:
        yield
    except PolybitError as error:
        raise (error if source in str(error) else PolybitError(f"text {source!r}: {error}")) from None


def draw(windows: Mapping[str, Tensor], weights: Mapping[str, float], count: int, *, seed: int = 0) -> Tensor:
    """Draw `count` windows [count, T], each source its share of them, in random order without repetition.

    windows: source -> [N, T], equal T. Shares are rounded to whole windows, largest remainders first.
    """
    check_weights(windows, weights)
    counts = whole_shares([weights[name] for name in weights], count)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for name, wanted in zip(weights, counts, strict=True):
        have = len(windows[name])
        if wanted > have:
            raise PolybitError(
                f"the mixture asks for {wanted} windows of {name!r}, which gives {have}: "
                "give a longer text, a shorter --window or fewer --samples"
            )
        drawn.append(windows[name][torch.randperm(have, generator=generator)[:wanted]])
    mixed_NT = torch.cat(drawn)
    return mixed_NT[torch.randperm(len(mixed_NT), generator=generator)]


def check_weights(windows: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Refuse shares that are no shares, unknown sources, and windows of different lengths."""
    unknown = [name for name in weights if name not in windows]
    bad = [value for value in weights.values() if not 0 <= value < float("inf")]
    if unknown or bad or sum(weights.values()) <= 0:
        raise PolybitError(
            f"mixture {dict(weights)!r:.120} cannot be drawn from {', '.join(map(repr, windows))}: "
            "give each of these texts a share of 0 or more, not all 0"
        )
    lengths = {windows[name].shape[1] for name in weights}
    if len(lengths) > 1:
        raise PolybitError(f"windows of {sorted(lengths)} tokens cannot be mixed: cut all texts to the same length")


def whole_shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` split in whole numbers by weight, largest remainders rounded up."""
    exact = [weight / sum(weights) * count for weight in weights]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: count - sum(counts)]:
        counts[index] += 1
    return counts
