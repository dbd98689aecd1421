"""`polybit judge`: let models answer, freeze the answers, have them judged by an endpoint, and offline by fidelity."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands.answers import FLOAT, Freezer, Row, gather_rows, open_reference, parse_entrant
from polybit.core.runtime import PolybitError, atomic_path

MODES = ("pair", "single", "skills", "fidelity")
REPLIES, VERDICTS, RUN_FILE = "replies.sqlite", "verdicts.jsonl", "run.json"
SHOWN = 6
LEAD_ANSWERS = 16  # float answers that tell how the model begins one


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Flags of `polybit judge`."""

    questions: str
    """Questions: a .jsonl file (MT-Bench, Vicuna, KoMT-Bench, FLASK or yours), a dataset id, mt-bench, komt-bench."""
    out: Path
    """Directory for answers, replies and verdicts; the same command goes on where an earlier one stopped."""
    reference: str | None = None
    """The float model (default: the one the first checkpoint says it was made from)."""
    precision: str | None = None
    """Precisions of models that name none, with commas (default: every stored width)."""
    mode: str | None = None
    """What to judge, with commas: pair, single, skills, fidelity (default: fidelity, and pair with an endpoint)."""
    baseline: str | None = None
    """Row that pairs are judged against (default: float; for fidelity, where float always wins: the first row)."""
    endpoint: str | None = None
    """Address of the judge, OpenAI-compatible, as in http://localhost:8000/v1."""
    judge: str | None = None
    """Name of the judge model at the endpoint."""
    key_from: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; a local judge needs none."""
    references: Path | None = None
    """Reference answers by question_id, shown to the judge for math, reasoning and coding."""
    prompts: Path | None = None
    """Judge prompts in FastChat's, KoMT-Bench's, FLASK's or Vicuna's form (default: our own)."""
    skills: Path | None = None
    """FLASK's description of the skills (default: our own one-liners)."""
    limit: int | None = None
    """Only the first so many questions."""
    max_tokens: int = 256
    """Longest answer."""
    judge_tokens: int = 2048
    """Longest reply of the judge."""
    timeout: float = 120.0
    """Seconds to wait for one reply."""
    retries: int = 4
    """Further attempts at one reply."""
    concurrency: int = 4
    """Requests at a time."""
    seed: int = 0
    """Seed of intervals."""
    json: Path | None = None
    """Write all numbers there too (they always are in OUT/run.json)."""
    restart: bool = False
    """Answer again instead of going on; replies of the judge are kept, they depend on the answers only."""
    trust_remote_code: bool = False
    """Allow code that a model's repository brings."""


def judge(*models: str, config: Annotated[JudgeConfig, Parameter(name="*")]) -> None:
    """Judge MODELS, each `[NAME=]MODEL[@PRECISION,...]` or `NAME=answers.jsonl`, against their float model."""
    modes = check(models, config)
    entrants = [parse_entrant(text) for text in models]
    from polybit.core.records import Run
    from polybit.evals.judge_questions import read_questions
    from polybit.hub.directory import output_lock
    from polybit.report.judged import terminal_tables

    questions = read_questions(config.questions, references=config.references)[: config.limit]
    run = Run("judge", {"models": list(models), **plain(config)})
    with output_lock(config.out), run.timed():
        run.numbers = measure(entrants, questions, modes, config)
        run.write(config.out / RUN_FILE)
    print(terminal_tables(run.numbers))
    print(f"\nAnswers, verdicts and numbers: {config.out}")
    if config.json is not None:
        run.write(config.json)


def plain(config: JudgeConfig) -> dict[str, Any]:
    """The configuration as JSON."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def check(models: Sequence[str], config: JudgeConfig) -> list[str]:
    """Refuse flags that make no sense before anything is loaded; returns the modes."""
    if not models:
        raise PolybitError(
            "no model to judge: give at least one, as in polybit judge my-model --questions q.jsonl --out d"
        )
    default = "pair,fidelity" if config.endpoint else "fidelity"
    modes = [mode.strip() for mode in (config.mode or default).split(",") if mode.strip()]
    for mode in modes:
        if mode not in MODES:
            raise PolybitError(f"--mode {mode!r} is not known: choose from {', '.join(MODES)}")
    asks = [mode for mode in modes if mode != "fidelity"]
    if asks and not (config.endpoint and config.judge):
        raise PolybitError(
            f"--mode {','.join(asks)} asks a judge: give --endpoint URL and --judge NAME, or --mode fidelity for the "
            "offline one"
        )
    least = {"limit": 1, "max_tokens": 1, "judge_tokens": 1, "retries": 0, "concurrency": 1}
    for flag, value in least.items():
        found = getattr(config, flag)
        if found is not None and found < value:
            raise PolybitError(f"--{flag.replace('_', '-')} {found} is not possible: give {value} or more")
    if not config.timeout > 0:
        raise PolybitError(f"--timeout {config.timeout:g} is not possible: give more than 0 seconds")
    if config.out.is_file():
        raise PolybitError(f"--out {config.out} is a file: give a directory")
    return modes


def measure(entrants, questions, modes: Sequence[str], config: JudgeConfig) -> dict[str, Any]:
    """Answers first, all of them frozen; then the verdicts."""
    from polybit.evals.conversation import converse
    from polybit.evals.judge import check_answers
    from polybit.evals.judge_questions import questions_digest
    from polybit.hub.lm import LocalLM
    from polybit.hub.workspace import model_digest

    named, model, tokenizer = open_reference(entrants, config.reference, trust_remote_code=config.trust_remote_code)
    reference = LocalLM(model, tokenizer)
    freezer = Freezer(config.out, questions, max_tokens=config.max_tokens, restart=config.restart)
    origin = {"model": model_digest(model), "precision": None}
    rows = [
        freezer.frozen(FLOAT, origin)
        or freezer.answer(
            FLOAT, origin, lambda scripts: converse(reference, scripts, max_tokens=config.max_tokens, label=FLOAT)
        )
    ]
    rows += gather_rows(
        entrants,
        freezer,
        precision=config.precision,
        max_tokens=config.max_tokens,
        trust_remote_code=config.trust_remote_code,
    )
    for row in rows:
        check_answers(row.name, questions, row.answers)
    baseline = find_row(rows, config.baseline or FLOAT)
    numbers: dict[str, Any] = {
        "reference": named,
        "questions": {"n": len(questions), "sha256": questions_digest(questions)},
        "baseline": baseline.name,
        "rows": {row.name: {"answers_sha256": row.sha256, "dropped": row.dropped, **(row.sizes or {})} for row in rows},
    }
    records: list[dict[str, Any]] = []
    if "fidelity" in modes:
        add_fidelity(numbers, records, reference, rows, questions, config)
    if any(mode != "fidelity" for mode in modes):
        numbers["judge"] = {"model": config.judge, "prompts": str(config.prompts or "polybit's own")}
        add_verdicts(numbers, records, rows, baseline, questions, modes, config)
    numbers["samples"] = samples(questions, rows)
    write_lines(config.out / VERDICTS, records)
    return numbers


def find_row(rows: Sequence[Row], name: str) -> Row:
    """A row by name."""
    for row in rows:
        if row.name == name:
            return row
    raise PolybitError(f"--baseline {name!r} is no row: choose from {', '.join(row.name for row in rows)}")


def add_verdicts(
    numbers: dict[str, Any], records: list[dict[str, Any]], rows, baseline: Row, questions, modes, config: JudgeConfig
) -> None:
    """Pairs against the baseline, single grades and skill grades, from the endpoint."""
    from polybit.evals import judge as judged
    from polybit.evals.judge_prompts import read_prompts, read_skills

    prompts, skills = read_prompts(config.prompts), read_skills(config.skills)
    for row in rows:
        found: dict[str, Any] = numbers["rows"][row.name]
        if "pair" in modes and row is not baseline:
            ask = asking(config, f"{row.name} against {baseline.name}")
            games = judged.judge_pairs(questions, row.answers, baseline.answers, prompts, ask)
            found["pair"] = judged.pair_numbers(games, seed=config.seed)
            records += [{"mode": "pair", "row": row.name, "baseline": baseline.name, **asdict(game)} for game in games]
        for mode in ("single", "skills"):
            if mode not in modes:
                continue
            ask = asking(config, f"{row.name}, {mode}")
            if mode == "single":
                grades = judged.judge_grades(questions, row.answers, prompts, ask)
            else:
                grades = judged.judge_skills(questions, row.answers, prompts, skills, ask)
            found[mode] = judged.grade_numbers(grades, seed=config.seed)
            records += [{"mode": mode, "row": row.name, **asdict(grade)} for grade in grades]


def asking(config: JudgeConfig, label: str) -> Callable[[list[list[dict[str, str]]]], list[Any]]:
    """The endpoint as a function from requests to replies."""
    from polybit.evals.judge_client import Endpoint, ReplyCache, ask

    endpoint = Endpoint(
        str(config.endpoint),
        str(config.judge),
        key=os.environ.get(config.key_from) or "none",
        max_tokens=config.judge_tokens,
        timeout=config.timeout,
        retries=config.retries,
        concurrency=config.concurrency,
    )
    cache = ReplyCache(config.out / REPLIES)
    return lambda requests: ask(endpoint, requests, cache, label=label)


def add_fidelity(
    numbers: dict[str, Any],
    records: list[dict[str, Any]],
    reference,
    rows: Sequence[Row],
    questions,
    config: JudgeConfig,
) -> None:
    """How close each row is to the float model's answers, and which of two rows is closer."""
    from polybit.evals import fidelity

    places = [(q, turn) for q in questions for turn in range(len(q.turns))]
    prompts, wanted, rows_tokens = fidelity_tokens(reference, rows, places, config.max_tokens)
    clusters = [question.id for question, _ in places]
    found: dict[str, list[fidelity.Closeness]] = {}
    for row in rows:
        nats = fidelity.mean_logprob(reference, prompts, rows_tokens[row.name], label=f"fidelity, {row.name}")
        pairs = zip(wanted, rows_tokens[row.name], nats, strict=True)
        found[row.name] = [fidelity.closeness(*item) for item in pairs]
    others = [row.name for row in rows if row.name != FLOAT]
    baseline = config.baseline if config.baseline in others else others[0]
    numbers["fidelity_baseline"] = baseline
    for row in rows:
        entry = numbers["rows"][row.name]
        entry["closeness"] = fidelity.closeness_numbers(found[row.name], clusters=clusters, seed=config.seed)
        if row.name not in (baseline, FLOAT):
            entry["fidelity"] = fidelity.fidelity_numbers(
                found[row.name], found[baseline], clusters=clusters, seed=config.seed
            )
        for (question, turn), item in zip(places, found[row.name], strict=True):
            shown = asdict(item) | {"nats": None if item.nats == float("-inf") else item.nats}
            records.append({"mode": "fidelity", "row": row.name, "question": question.id, "turn": turn + 1, **shown})


def fidelity_tokens(reference, rows: Sequence[Row], places, max_tokens: int):
    """Prompts with the float model's own history, its answers, and every row's, all in the reference's tokens."""
    from polybit.data.text import encode
    from polybit.evals.conversation import fit, history
    from polybit.evals.fidelity import answer_lead

    def ids(text: str) -> list[int]:
        return encode(reference.tokenizer, text).tolist()

    own = next(row for row in rows if row.name == FLOAT).answers
    prompts = [
        fit(reference, history(question.turns, own[question.id][:turn]), max_tokens)[0] for question, turn in places
    ]
    texts = {row.name: [row.answers[question.id][turn].strip() for question, turn in places] for row in rows}
    first = texts[FLOAT][:LEAD_ANSWERS]
    lead = answer_lead(reference, prompts[:LEAD_ANSWERS], first, ids)
    tokens = {name: [ids(lead + text) if text else [] for text in said] for name, said in texts.items()}
    return prompts, tokens[FLOAT], tokens


def samples(questions, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A few questions with every row's answers, those first where the rows differ most."""

    def spread(question) -> int:
        return len({tuple(row.answers[question.id]) for row in rows})

    chosen = sorted(questions, key=lambda question: -spread(question))[:SHOWN]
    return [
        {"question": q.id, "turns": list(q.turns), "answers": {row.name: row.answers[q.id] for row in rows}}
        for q in chosen
    ]


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line, written atomically."""
    import json

    with atomic_path(path) as staged:
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        staged.write_text("".join(lines), encoding="utf-8")
