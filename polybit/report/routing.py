"""A router as the terminal and a page show it: the cost-quality curve beside fixed widths, chance and the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from polybit.report.frame import framed, pictured, short_name
from polybit.report.plots import lines_over
from polybit.report.tables import aligned, estimate, number, percent

Json = Mapping[str, Any]


def told(numbers: Json) -> str:
    """The curve at the budget, the area, and what it means, in a few lines."""
    here, area = numbers["at_budget"], numbers["area"]
    shares = ", ".join(f"{percent(s)} {w}" for w, s in zip(numbers["widths"], here["shares"], strict=True) if s)
    fixed = numbers["curves"]["fixed"]
    rows = [
        [f"always {w}", f"{b:g}", number(h)]
        for w, b, h in zip(numbers["widths"], fixed["bits"], fixed["harm"], strict=True)
    ]
    rows += [
        ["router", f"{here['bits']:.2f}", number(here["router"])],
        ["random, same shares", f"{here['bits']:.2f}", number(here["random"])],
        ["oracle", f"{here['budget']:g}", number(here["oracle"])],
    ]
    better = area["low"] > 0
    verdict = (
        "Routing by prompt beats chance at equal cost."
        if better
        else "Routing by prompt is not shown to beat chance at equal cost: a fixed width does as well here."
    )
    return "\n".join(
        [
            aligned(["routing", "mean bits", "KL, nats per token"], rows),
            f"At {here['budget']:g} bits: {shares}.",
            f"Saved against chance, nats per token: {estimate(here['difference'])}; over all budgets {estimate(area)}.",
            f"{numbers['prompts']} prompts, each routed by a model that never saw it.",
            verdict,
            f"The router itself takes {1e6 * numbers['seconds_per_prompt']:.0f} microseconds per prompt.",
            *(gate_line(pair, found) for pair, found in numbers.get("gates", {}).items()),
        ]
    )


def gate_line(pair: str, found: Json) -> str:
    """What a gate at its learnt margin does to answers it was not learnt from."""
    low, _, high = pair.partition(":")
    return (
        f"Gate {low} at {high}: leads under {found['margin']:.2g} nats; on other answers {estimate(found['removed'])} "
        f"of the flips removed for {estimate(found['extra_bytes'])} of the bytes more."
    )


def page(run: Json) -> str:
    """One self-contained HTML page."""
    numbers = run["numbers"]
    lines = {name: list(zip(curve["bits"], curve["harm"], strict=True)) for name, curve in numbers["curves"].items()}
    drawn = lines_over(lines, "mean bits per weight", "KL, nats per token")
    model = short_name(run["config"]["model"])
    return framed(f"Routing {model}", pictured(drawn), f"<pre>{escape(told(numbers))}</pre>")
