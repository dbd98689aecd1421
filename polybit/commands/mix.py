"""`polybit mix`: which mixture of texts to calibrate on, from one forward pass per text; and is that true?"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.core.nursery import warm
from polybit.options.mix import MixOptions
from polybit.report.mixture import as_flag, chosen, verified_table


def mix(model: str, /, *, options: Annotated[MixOptions, Parameter(name="*", consume_multiple=True)]) -> None:
    """Find the mixture of texts MODEL (a local path, a hub id, or tinychat) is best calibrated on.

    The result is what `polybit quantize --mix FILE=SHARE,FILE=SHARE` takes.
    """
    warm(options, "polybit.acts.mix")
    from polybit.acts.mix import mix as act

    numbers = act(model, options).numbers
    print(chosen(numbers["mixture"]))
    if "verified" in numbers:
        print(verified_table(numbers["verified"]))
    spec = as_flag(numbers["mixture"])
    print(f"Next: polybit quantize {model} --out OUT --bits {options.bits} --mix {spec}")
