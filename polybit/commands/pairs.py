"""`polybit pairs`: what the float and the quantized model answer to the same prompts, with the reference's scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.core.nursery import warm
from polybit.options.pairs import PairsOptions


def pairs(model: str, /, *, options: Annotated[PairsOptions, Parameter(name="*")], json: Json = None) -> None:
    """Answer prompts with MODEL in float and quantized, and keep where the answers part.

    MODEL is a float model, which is then rounded to --precision, or a polybit checkpoint with its float model.
    """
    warm(options, "polybit.acts.pairs")
    from polybit.acts.pairs import pairs as act

    run = act(model, options)
    keep(run, json)
    numbers = run.numbers
    star = numbers["mean_first_divergence"]
    said = f"{numbers['pairs']} pairs at {numbers['precision']}, {numbers['identical']} identical answers dropped, of"
    said = f"float answers of {numbers['mean_answer_tokens']:.1f} tokens to" if numbers["float_only"] else said
    print(
        f"{options.out}: {said} {numbers['prompts']} prompts ({numbers['empty']} empty, {numbers['duplicate']} "
        f"repeated and {numbers['too_long']} over-long ones left out)."
    )
    if star is not None:
        print(f"Answers part after {star:.1f} of {numbers['mean_answer_tokens']:.1f} tokens on average.")
    print(next_step(model, options.out, numbers))


def next_step(model: str, out: Path, numbers: Mapping[str, Any]) -> str:
    """What to do with the pairs, or why there is nothing to do."""
    if not numbers["pairs"] and not numbers.get("float_only"):
        return (
            f"All answers are the same at {numbers['precision']}, so there is nothing to prefer: choose a lower "
            "precision, more prompts or longer answers (polybit align --method kd learns from these all the same)."
        )
    return f"Next: polybit align {model} --pairs {out} --precision {numbers['precision']} --out aligned"
