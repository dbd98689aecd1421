"""A mixture of calibration texts as the terminal shows it: the chosen shares, and what measuring says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polybit.report.tables import aligned, estimate, percent


def chosen(mixture: Mapping[str, Any]) -> str:
    """The best mixture in a line."""
    best = mixture["best"]
    share = ", ".join(f"{100 * weight:.0f} % {source}" for source, weight in best["weights"].items())
    return f"{mixture['criterion']}: {share} (alignment {best['alignment']:.4f})"


def as_flag(mixture: Mapping[str, Any]) -> str:
    """The best mixture as `quantize --mix` takes it."""
    return ",".join(f"{source}={weight:g}" for source, weight in mixture["best"]["weights"].items() if weight > 0)


def verified_table(verified: Mapping[str, Any]) -> str:
    """Measured KL per mixture and text, and the regret of every criterion."""
    texts = list(verified["worst_kl"]["best"])
    rows = [
        [
            " + ".join(f"{weight:.2f}" for weight in row["weights"].values()),
            *(estimate(row["kl"][text]) for text in texts),
            estimate(row["worst_kl"]),
            estimate(row["worst_share"], percent),
        ]
        for row in verified["points"]
    ]
    lines = [
        aligned(["shares", *(f"KL {Path(text).name}" for text in texts), "worst KL", "worst rise"], rows),
        "Worst rise: of the text that loses most against its own best mixture. Regret: the choice less the best point.",
    ]
    plain, share = verified["worst_kl"], verified["worst_share"]
    for criterion in plain["regret"]:
        lines.append(
            f"regret of {criterion}: {estimate(plain['regret'][criterion])} nats per token "
            f"(noise {plain['noise']:.4f}); "
            f"{estimate(share['regret'][criterion], percent)} (noise {percent(share['noise'])})"
        )
    return "\n".join(lines)
