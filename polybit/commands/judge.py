"""`polybit judge`: let models answer, freeze the answers, have them judged by an endpoint, and offline by fidelity."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.core.nursery import warm
from polybit.options.judge import JudgeOptions
from polybit.report.judged import terminal_tables


def judge(*models: str, options: Annotated[JudgeOptions, Parameter(name="*")], json: Json = None) -> None:
    """Judge MODELS, each `[NAME=]MODEL[@PRECISION,...]` or `NAME=answers.jsonl`, against their float model.

    The run with all its numbers is always in OUT/run.json; --json writes it there too.
    """
    warm(options, "polybit.acts.judge")
    from polybit.acts.judge import judge as act

    run = act(models, options)
    print(terminal_tables(run.numbers))
    print(f"\nAnswers, verdicts and numbers: {options.out}")
    keep(run, json)
