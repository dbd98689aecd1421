"""`polybit eval`: what each width of a checkpoint costs against its float model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands import suites
from polybit.core.runtime import PolybitError
from polybit.hub.models import EMBEDDED, open_model, resolve

TASKS = ("reading", "arithmetic", "dialogue")  # those of evals.tasks, spelled here so that --help loads no torch


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Flags of `polybit eval`."""

    reference: str | None = None
    """The float model to compare with (default: the one the checkpoint says it was made from)."""
    text: str | None = None
    """Text to measure on: a .txt or .jsonl file or a named set (default: fresh text of the embedded generator for
    tinychat, otherwise text the reference writes itself)."""
    precision: str | None = None
    """Only these precisions, with commas, as in w4 or w8,w4a8 (default: every stored width)."""
    windows: int = 64
    """Windows of text to read."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    prompts: str | None = None
    """Prompts both models answer freely: a .txt (one per line) or .jsonl file, or any source of polybit pairs (default:
    beginnings of the text)."""
    answers: int = 32
    """How many prompts to answer; 0 = none."""
    max_tokens: int = 48
    """Longest free answer."""
    tasks: str = ""
    """Tasks of the embedded generator, with commas: reading, arithmetic, dialogue."""
    items: int = 200
    """Questions per task."""
    squad: str | None = None
    """Questions of a SQuAD 1.1, SQuAD 2.0 or KorQuAD file to answer too, or 'embedded' for the reading task."""
    squad_items: int | None = None
    """How many of them, drawn at random (default: all)."""
    squad_head: str = "generate"
    """How they are answered: generate (free text), or span (a model with a span head; nothing else is measured)."""
    choices: str | None = None
    """Multiple-choice sets or GSM8K, with commas: files, MMLU's test directory, or dataset ids."""
    choice_items: int | None = None
    """Only the first so many items of each file of --choices, and of each task of --lm-eval."""
    form: str | None = None
    """How choices are asked: cloze or letters (default: letters for MMLU, cloze for the others)."""
    shots: int = 0
    """Worked examples before each item of --choices."""
    shots_from: str | None = None
    """Where the worked examples stand, one source per set of --choices, with commas."""
    lm_eval: str | None = None
    """Tasks of lm-eval, with commas; needs the extra lm-eval."""
    lm_eval_path: str | None = None
    """Directory with task files of your own for --lm-eval."""
    breakdown: bool = False
    """Ask what the first flipped token does, and what the quantized model does after it."""
    talk: int = 0
    """Turns of long conversations in which to follow the drift of the answers; 0 = none."""
    talks: str | None = None
    """Conversations whose user messages are taken: a .jsonl of {"messages"} (default: the embedded generator)."""
    talk_count: int = 16
    """How many long conversations."""
    seed: int = 0
    """Seed of intervals and of drawn text."""
    json: Path | None = None
    """Write all numbers there; `polybit report` turns them into a page."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def evaluate(target: str, /, *, config: Annotated[EvalConfig, Parameter(name="*")] = EvalConfig()) -> None:
    """Compare TARGET (a polybit directory or any model) with its float reference, paired and with intervals."""
    check(config)
    from polybit.commands.squad import squad_table
    from polybit.core.records import Run
    from polybit.report.suites import terminal_tables as suite_tables
    from polybit.report.summary import terminal_table

    run = Run("eval", {"target": target, **asdict(config), "json": str(config.json or "")})
    with run.timed():
        numbers, names = measure(target, config)
    run.config |= names
    run.numbers = numbers
    if "presets" in numbers:
        print(terminal_table(numbers))
    print(suite_tables(numbers), end="")
    if "squad" in numbers:
        print("\n" + squad_table(numbers["squad"]))
    if config.json is not None:
        run.write(config.json)
        print(f"\nAll numbers: {config.json}")


def check(config: EvalConfig) -> None:
    """Refuse flags that make no sense before anything is loaded."""
    for flag, value, least in (
        ("windows", config.windows, 1),
        ("answers", config.answers, 0),
        ("max-tokens", config.max_tokens, 1),
        ("items", config.items, 1),
        ("shots", config.shots, 0),
        ("talk", config.talk, 0),
        ("talk-count", config.talk_count, 1),
    ):
        if value < least:
            raise PolybitError(f"--{flag} {value} is not possible: give {least} or more")
    task_names(config)
    precision_names(config)
    suites.check(config)
    from polybit.commands.squad import check_squad

    check_squad(config)


def task_names(config: EvalConfig) -> list[str]:
    """The tasks asked for, refused when unknown."""
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    for name in names:
        if name not in TASKS:
            raise PolybitError(f"task {name!r} is not known: choose from {', '.join(TASKS)}")
    return names


def precision_names(config: EvalConfig) -> list[str] | None:
    """The precisions asked for, as text that reads back; None = all stored widths."""
    if config.precision is None:
        return None
    return [name.strip() for name in config.precision.split(",") if name.strip()]


def measure(target: str, config: EvalConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Load both models, gather material, compare: (numbers, names for the report)."""
    if config.squad_head == "span":
        from polybit.commands.squad import measure_spans

        return {"squad": measure_spans(target, config)}, {"target_name": Path(target).name}
    from polybit.commands.material import gather_material
    from polybit.compress.sizes import base_model, default_presets, preset_sizes, stored_widths
    from polybit.evals.compare import compare
    from polybit.hub.lm import LocalLM

    model, tokenizer = open_model(target, trust_remote_code=config.trust_remote_code)
    widths = stored_widths(model)
    reference_name = config.reference or base_model(model)
    if reference_name is None:
        if widths is not None:
            raise PolybitError(f"{target} does not say which model it was made from: name it with --reference")
        reference_name = target
    if widths is None and precision_names(config) is not None:
        raise PolybitError(
            f"--precision {config.precision}: {target} is a float model without stored widths; quantize it first"
        )
    float_model, float_tokenizer = open_model(reference_name, trust_remote_code=config.trust_remote_code)
    if stored_widths(float_model) is not None:
        raise PolybitError(f"the reference {reference_name} is itself quantized: give the float model it was made from")
    presets: list[str | None] = list(precision_names(config) or (default_presets(model) if widths else ())) or [None]
    embedded = is_embedded(reference_name)
    material = gather_material(float_model, float_tokenizer, config, embedded=embedded, tasks=task_names(config))
    sizes: Mapping[str, Mapping[str, Any]] = preset_sizes(model, [p for p in presets if p]) if widths else {}
    reference, quantized = LocalLM(float_model, float_tokenizer), LocalLM(model, tokenizer)
    numbers = compare(
        reference,
        quantized,
        presets,
        material.material,
        sizes=sizes,
        breakdown=config.breakdown,
        seed=config.seed,
    )
    numbers |= suites.measure(reference, quantized, presets, config)
    if config.squad is not None:
        from polybit.commands.squad import squad_numbers

        views = {"float": (reference, None)} | {preset or "as loaded": (quantized, preset) for preset in presets}
        numbers["squad"] = squad_numbers(views, config, reference="float")
    names = {
        "target_name": Path(target).name,
        "reference_name": Path(reference_name).name,
        "text_name": material.text_name,
    }
    return numbers, names


def is_embedded(model: str) -> bool:
    """Whether a MODEL argument means the embedded model."""
    embedded = Path(resolve(EMBEDDED))
    return Path(resolve(model)).resolve() == embedded.resolve()
