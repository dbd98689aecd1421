"""`polybit export`: write a checkpoint in the format of another engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.export.table import IMATRIX_COMMAND as COMMAND
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
    if (where := numbers["difference"]["where"]) and options.exporter.wide:
        print(f"With --exact none would: it writes with 32 bits the {len(where)} layers in which 16 are too few.")
    print(f"{options.out}: {size(numbers['bytes'])} for {options.exporter.engines}.")
    if options.imatrix:
        print(f"llama.cpp's own types: {COMMAND.format(path=options.out)}")
    if sent := numbers.get("pushed"):
        print_pushed(sent)
    print(f"Next: {options.exporter.run.format(path=options.out)}")


def print_pushed(sent: Mapping[str, Any]) -> None:
    """Where it lies on the hub, or what would go there."""
    count = f"{len(sent['files'])} files, {size(sent['bytes'])}"
    if sent["commit"]:
        print(f"Pushed to {sent['repo']}: {count}; {sent['commit']}")
        return
    kind = "private" if sent["private"] else "public"
    print(f"Dry run, nothing was sent: {count} would go to {sent['repo']} ({kind} where it is new):")
    for name, count in sent["files"].items():
        print(f"  {name}  {size(count)}")
