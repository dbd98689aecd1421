"""The acts as a library: `polybit.quantize("tinychat", out="my-model", bits=4)`, every option a typed keyword.

Nothing heavy is imported before a function is called. Each returns the Run with all its numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from polybit.core.nursery import warm
from polybit.core.parts import load
from polybit.options.align import AlignOptions
from polybit.options.allocate import AllocateOptions
from polybit.options.attack import AttackOptions
from polybit.options.bench import BenchOptions
from polybit.options.chat import ChatOptions
from polybit.options.columns import ColumnsOptions
from polybit.options.cost import CostOptions
from polybit.options.doctor import DoctorOptions
from polybit.options.evaluate import EvalOptions
from polybit.options.export import ExportOptions
from polybit.options.frontier import FrontierOptions
from polybit.options.generate import GenerateOptions
from polybit.options.judge import JudgeOptions
from polybit.options.mix import MixOptions
from polybit.options.pairs import PairsOptions
from polybit.options.plan import PlanOptions
from polybit.options.quantize import QuantizeOptions
from polybit.options.report import ReportOptions
from polybit.options.route import RouteOptions
from polybit.options.serve import ServeOptions
from polybit.options.study import StudyOptions
from polybit.options.sweep import SweepOptions
from polybit.options.train import TrainOptions

if TYPE_CHECKING:  # importing polybit loads no torch
    from polybit.core.records import Run

P = ParamSpec("P")
O = TypeVar("O")


def act(record: Callable[P, O], path: str, summary: str) -> Callable[Concatenate[str, P], Run]:
    """The act at `path`, which takes a model and a record of options, with the fields of the record as keywords."""

    def call(model: str, /, *args: P.args, **kwargs: P.kwargs) -> Run:
        options = record(*args, **with_paths(record, kwargs))
        if hasattr(options, "workers"):
            warm(options, path.partition(":")[0])
        return load(path)(str(model), options)

    name = path.partition(":")[2]
    first = inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY, annotation="str")
    signature = inspect.signature(record)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[first, *signature.parameters.values()], return_annotation="Run"
    )
    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{summary}\n\n{explained(record)}"
    return call


def with_paths(record: Callable[..., object], told: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords, with text where a record has a Path made one: `out="my-model"`."""
    paths = {known.name for known in fields(record) if known.type in ("Path", "Path | None")}  # type: ignore[arg-type]
    return {name: Path(v) if name in paths and isinstance(v, str) else v for name, v in told.items()}


def explained(record: Callable[..., object]) -> str:
    """The fields of a record with the texts that follow them in its source, one per paragraph."""
    import ast

    try:
        trees = [ast.parse(inspect.getsource(part)) for part in inspect.getmro(record)[:-1]]  # type: ignore[arg-type]
    except OSError:  # installed without sources
        return ""
    bodies = [tree.body[0].body for tree in trees]  # type: ignore[attr-defined]
    said = {known.name: known.metadata["help"] for known in fields(record) if "help" in known.metadata}  # type: ignore[arg-type]
    for field, text in chain.from_iterable(map(pairwise, bodies)):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            said[ast.unparse(field.target)] = ast.literal_eval(text.value)
    order = [known.name for known in fields(record) if known.name in said]  # type: ignore[arg-type]
    return "\n".join(f"{name}: {' '.join(said[name].split())}" for name in order)


pairs = act(PairsOptions, "polybit.acts.pairs:pairs", "Answer prompts in float and quantized; keep where they part.")
align = act(AlignOptions, "polybit.acts.align:align", "Teach a quantized model to answer as its float self.")
generate = act(GenerateOptions, "polybit.acts.generate:generate", "Answer a prompt with a model at a chosen width.")
chat = act(ChatOptions, "polybit.acts.chat:chat", "Talk with a model, at a width that may change between turns.")
quantize = act(QuantizeOptions, "polybit.acts.quantize:quantize", "Turn a model into one checkpoint of many widths.")
plan = act(PlanOptions, "polybit.acts.plan:plan", "Say what quantizing would give and cost, before running it.")
cost = act(CostOptions, "polybit.acts.cost:cost", "Say what a token costs at each precision: counted, read, measured.")

evaluate = act(EvalOptions, "polybit.acts.evaluate:evaluate", "Measure what each width costs against the float model.")


def judge(*models: str, **options: Any) -> Run:
    """Have answers of models, each `[NAME=]MODEL[@PRECISION,...]`, judged by an endpoint, or offline by fidelity.

    {options}
    """
    told = JudgeOptions(**with_paths(JudgeOptions, options))
    warm(told, "polybit.acts.judge")
    return load("polybit.acts.judge:judge")(models, told)


judge.__doc__ = str(judge.__doc__).format(options=explained(JudgeOptions))
report = act(ReportOptions, "polybit.acts.report:report", "Write one self-contained HTML page from measured numbers.")


def bench(what: str, model: str | None = None, /, **options: Any) -> Run:
    """Time one product ("linear"), writing ("generate") or changing the width ("switch"), here and now.

    Without a model a random one is timed. {options}
    """
    return load("polybit.acts.bench:bench")(what, model, BenchOptions(**options))


bench.__doc__ = str(bench.__doc__).format(options="\n\n" + explained(BenchOptions))
attack = act(
    AttackOptions, "polybit.acts.attack:attack", "Attack a checkpoint at each width and answer at every other."
)
allocate = act(AllocateOptions, "polybit.acts.allocate:allocate", "Spend a budget of bits where it matters.")
mix = act(MixOptions, "polybit.acts.mix:mix", "Find the mixture of texts to calibrate on.")
columns = act(ColumnsOptions, "polybit.acts.columns:columns", "Search widths inside layers and write them as a plan.")
frontier = act(FrontierOptions, "polybit.acts.frontier:frontier", "Draw the best precision per layer at every cost.")
train = act(TrainOptions, "polybit.acts.train:train", "Train one model to be good at several precisions.")
study = act(StudyOptions, "polybit.acts.study:study", "Answer the questions about switchable precision for a model.")
sweep = act(SweepOptions, "polybit.acts.sweep:sweep", "Quantize and measure under every combination of some options.")
serve = act(ServeOptions, "polybit.acts.serve:serve", "Answer over HTTP, each request at its own precision.")
route = act(RouteOptions, "polybit.acts.route:route", "Learn which width a prompt needs, for the server's auto.")
export = act(ExportOptions, "polybit.acts.export:export", "Write a checkpoint in the format of another engine.")


def doctor(**options: Any) -> Run:
    """Look at versions, compiled kernels, GPU, caches and free disk; what to do stands in the numbers.

    {options}
    """
    return load("polybit.acts.doctor:doctor")(DoctorOptions(**with_paths(DoctorOptions, options)))


doctor.__doc__ = str(doctor.__doc__).format(options=explained(DoctorOptions))
