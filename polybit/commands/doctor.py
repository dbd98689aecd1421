"""`polybit doctor`: what this installation can do, and what to do about what it cannot."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.doctor import DoctorOptions

MARKS = {"good": "ok  ", "note": "note", "fault": "BAD "}


def doctor(*, options: Annotated[DoctorOptions, Parameter(name="*")] = DoctorOptions(), json: Json = None) -> None:
    """Look at versions, compiled kernels, GPU, caches and free disk, and say what to do. Nothing is changed.

    The exit status is 1 where something is broken.
    """
    from polybit.acts.doctor import doctor as act

    run = act(options)
    checks = run.numbers["checks"]
    width = max(len(check["what"]) for check in checks)
    for check in checks:
        print(f"{MARKS[check['state']]}  {check['what']:{width}}  {check['found']}")
        if check["remedy"]:
            print(f"{'':{width + 6}}  -> {check['remedy']}")
    keep(run, json)
    if any(check["state"] == "fault" for check in checks):
        raise SystemExit(1)
