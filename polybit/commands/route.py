"""`polybit route`: learn which width a prompt needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, can_be_written, keep
from polybit.options.route import RouteOptions

Page = Annotated[
    Path | None,
    Parameter(help="Write the cost-quality curve as one HTML page there.", validator=can_be_written("--page")),
]


def route(
    model: str, /, *, options: Annotated[RouteOptions, Parameter(name="*")], json: Json = None, page: Page = None
) -> None:
    """Fit the router of MODEL (a polybit directory) to prompts as users send them, for `polybit serve`'s NAME@auto.

    It is judged on prompts it was not fitted to, against fixed widths, random routing at equal cost and the oracle, and
    kept in the checkpoint's directory.
    """
    from polybit.acts.route import route as act
    from polybit.core.runtime import atomic_path
    from polybit.report.routing import page as routing_page
    from polybit.report.routing import told

    run = act(model, options)
    print(told(run.numbers))
    keep(run, json)
    if page is not None:
        with atomic_path(page) as staged:
            staged.write_text(routing_page(run.to_json()), encoding="utf-8")
    if run.numbers["kept"]:
        print(f"Kept in {model}/router.json. Next: polybit serve {model}, and ask for NAME@auto")
