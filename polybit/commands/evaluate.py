"""`polybit eval`: what each width of a checkpoint costs against its float model."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Annotated

from cyclopts import Group, Parameter

from polybit.commands.flags import Json, keep
from polybit.core.nursery import warm
from polybit.evals.table import SUITES
from polybit.options.checks import WorkerOptions
from polybit.options.evaluate import (
    WINDOWS,
    ChoiceOptions,
    EvalModelOptions,
    EvalOptions,
    EvalTaskOptions,
    EvalTextOptions,
    LmEvalOptions,
    SquadOptions,
    TalkOptions,
)


def part(title: str, rank: int) -> Parameter:
    """The flags of one part under their own heading of --help, in this order."""
    return Parameter(name="*", group=Group(title, sort_key=rank))


def evaluate(
    target: str,
    /,
    *,
    model: Annotated[EvalModelOptions, part("What is compared", 1)] = EvalModelOptions(),
    text: Annotated[EvalTextOptions, part("On text", 2)] = EvalTextOptions(),
    tasks: Annotated[EvalTaskOptions, part("Tasks of the embedded generator", 3)] = EvalTaskOptions(),
    choices: Annotated[ChoiceOptions, part("Multiple choice, GSM8K", 4)] = ChoiceOptions(),
    squad: Annotated[SquadOptions, part("SQuAD", 5)] = SquadOptions(),
    lm_eval: Annotated[LmEvalOptions, part("lm-eval", 6)] = LmEvalOptions(),
    talk: Annotated[TalkOptions, part("Long conversations", 7)] = TalkOptions(),
    workers: Annotated[WorkerOptions, part("Who does it", 8)] = WorkerOptions(),
    json: Json = None,
) -> None:
    """Compare TARGET (a polybit directory or any model) with its float reference, paired and with intervals.

    Suites alone (--tasks, --choices, --squad, --lm-eval, --talk) are measured without text, unless --text or
    --windows asks for it.
    """
    parts = (model, text, tasks, choices, squad, lm_eval, talk, workers)
    options = EvalOptions(**{field.name: getattr(one, field.name) for one in parts for field in fields(one)})
    if json is not None and options.predictions is None:
        options = replace(options, predictions=json.with_name(json.stem + "-predictions"))
    print(announcement(options), file=sys.stderr)
    warm(options, "polybit.acts.evaluate")
    from polybit.acts.evaluate import evaluate as act
    from polybit.report.suites import terminal_tables
    from polybit.report.summary import terminal_table

    run = act(target, options)
    if "presets" in run.numbers:
        print(terminal_table(run.numbers))
    print(terminal_tables(run.numbers), end="")
    if json is not None:
        keep(run, json)
        print(f"\nAll numbers: {json}")


def announcement(options: EvalOptions) -> str:
    """What is about to be measured, and what is not."""
    asked = [SUITES[name].summary for name in options.suites]
    if options.with_text:
        asked.insert(0, f"{options.windows or WINDOWS} windows of text, {options.answers} answers")
    note = "" if options.with_text or options.squad_head == "span" else " only (--text or --windows adds text)"
    return f"polybit: measuring {', '.join(asked)}{note}"
