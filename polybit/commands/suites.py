"""What `polybit eval` measures on request: multiple choice, lm-eval's tasks, long conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError

FORMS = ("cloze", "letters")  # those of evals.choices_data, spelled here so that --help loads no torch
TALK_SEED = 30_000  # seed of the embedded conversations asked here; no recipe trains or chooses with them


def check(config: Any) -> None:
    """Refuse flags that make no sense before anything is loaded; `config` is an EvalConfig."""
    if config.form is not None and config.form not in FORMS:
        raise PolybitError(f"--form {config.form!r} is not known: choose from {', '.join(FORMS)}")
    if config.choice_items is not None and config.choice_items < 1:
        raise PolybitError(f"--choice-items {config.choice_items} is not possible: give 1 or more")
    if config.shots and len(split(config.shots_from)) != len(split(config.choices)):
        raise PolybitError(
            f"--shots {config.shots} needs --shots-from with one source for each set of --choices: "
            f"{len(split(config.choices))} sets, {len(split(config.shots_from))} sources"
        )
    if config.lm_eval_path is not None and not Path(config.lm_eval_path).is_dir():
        raise PolybitError(f"--lm-eval-path {config.lm_eval_path} is no directory: give the one your task files are in")


def split(names: str | None) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def measure(float_lm, lm, presets: Sequence[str | None], config: Any) -> dict[str, Any]:
    """Numbers of everything that was asked for: {"choices", "lm_eval", "talk"}."""
    found: dict[str, Any] = {}
    if sets := choice_sets(config):
        from polybit.evals.choices import compare_choices

        found["choices"] = compare_choices(float_lm, lm, presets, sets, seed=config.seed)
    if tasks := split(config.lm_eval):
        found["lm_eval"] = lm_eval_numbers(float_lm, lm, presets, tasks, config)
    if config.talk:
        from polybit.evals.drift import drift

        scripts = talk_scripts(config)
        found["talk"] = drift(float_lm, lm, presets, scripts, max_tokens=config.max_tokens, seed=config.seed)
    return found


def choice_sets(config: Any) -> list[Any]:
    """The sets of --choices with their worked examples; sets of one name are told apart by their directory."""
    from polybit.evals.choices import ChoiceSet
    from polybit.evals.choices_data import read_items

    sources = split(config.choices)
    names = [set_name(source, sources) for source in sources]
    shown = split(config.shots_from) if config.shots else [""] * len(sources)
    return [
        ChoiceSet(
            name,
            read_items(source, limit=config.choice_items),
            config.form,
            config.shots,
            read_items(examples) if examples else (),
        )
        for name, source, examples in zip(names, sources, shown, strict=True)
    ]


def set_name(source: str, others: Sequence[str]) -> str:
    """The last part of a path, with the directory before it where another set is called the same."""
    path = Path(source)
    plain = ("test", "dev", "val", "validation")
    same = [other for other in others if Path(other).stem == path.stem]
    return f"{path.parent.name}/{path.stem}" if len(same) > 1 or path.stem in plain else path.stem


def lm_eval_numbers(float_lm, lm, presets: Sequence[str | None], tasks: Sequence[str], config: Any) -> dict[str, Any]:
    """lm-eval's tasks through the bridge."""
    try:
        from polybit.evals.lm_eval_bridge import compare_tasks
    except ImportError as error:
        raise PolybitError(f"--lm-eval needs lm-eval ({error}): run pip install 'polybit[lm-eval]'") from error
    return compare_tasks(
        float_lm,
        lm,
        presets,
        tasks,
        include=None if config.lm_eval_path is None else Path(config.lm_eval_path),
        limit=config.choice_items,
        shots=config.shots or None,
        seed=config.seed,
    )


def talk_scripts(config: Any) -> list[list[str]]:
    """User messages of the long conversations."""
    from polybit.evals.drift import scripts_from

    if config.talks is None:
        from polybit.data import synth

        conversations = synth.conversations(config.talk_count * config.talk, TALK_SEED + config.seed, split="test")
    else:
        from polybit.data.rows import read_rows
        from polybit.data.text import read_messages

        rows = enumerate(read_rows(config.talks), start=1)
        conversations = [
            read_messages(row.get("messages"), f"Row {n} of {config.talks!r}, 'messages',") for n, row in rows
        ]
    return scripts_from(conversations, config.talk)[: config.talk_count]
