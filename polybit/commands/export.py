"""`polybit export`: write a checkpoint in the format of another engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.export import ExportOptions
from polybit.report.exported import how_exact
from polybit.report.tables import size


def export(model: str, /, *, options: Annotated[ExportOptions, Parameter(name="*")], json: Json = None) -> None:
    """Write MODEL (a polybit checkpoint) at one precision in the format of another engine.

    What that engine would read is compared with what polybit reads before the export takes its name.
    """
    from polybit.acts.export import export as act

    run = act(model, options)
    keep(run, json)
    print_result(options, run.numbers)


def print_result(options: ExportOptions, numbers: Mapping[str, Any]) -> None:
    """How exact it is, how large, and what runs it."""
    print(how_exact(numbers))
    print(f"{options.out}: {size(numbers['bytes'])} for {options.exporter.engines}.")
    print(f"Next: {options.exporter.run.format(path=options.out)}")
