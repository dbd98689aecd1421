"""One quantized model at all its precisions against its float model: everything `polybit eval` reports.

What `compare` returns is the `numbers` of `polybit eval --json`, a contract: schema.py describes it (docs/eval-json.md)
and refuses a result that breaks it. The numbers themselves are those of METRICS and REFERENCE in table.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from polybit.core.records import Estimate
from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt, encode_prompt
from polybit.evals import tasks as tasks_of
from polybit.evals.breakdown import flip_breakdown
from polybit.evals.readings import PairedAnswers, PairedReading, PairedTokens
from polybit.evals.scoring import bootstrap
from polybit.evals.sharing import Here, Part, Share, cut, joined, said
from polybit.evals.table import METRICS, REFERENCE
from polybit.evals.token_flip import QuantizedTokens, ReferenceTokens, answer_batches, measure_tokens, text_batches
from polybit.hub.lm import LocalLM

AS_LOADED = "as loaded"
ANSWERS = 32  # prompts that are a part: answered together, whoever answers them
REF = "the reference"  # key of the reference beside the presets; no precision can be written like this


@dataclass(frozen=True, slots=True)
class EvalMaterial:
    """What two models are compared on: windows of text [N, T], prompts to answer freely, tasks with right answers.

    windows_NT: None = no text is read and no prompt answered, only tasks.
    """

    windows_NT: Tensor | None
    prompts: Sequence[Prompt] = ()
    tasks: Mapping[str, Sequence[tasks_of.TaskItem]] = field(default_factory=dict)
    max_tokens: int = 64


def compare(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    material: EvalMaterial,
    *,
    sizes: Mapping[str, Mapping[str, Any]] | None = None,
    shown: int = 6,
    breakdown: bool = False,
    seed: int = 0,
    share: Share | None = None,
) -> dict[str, Any]:
    """Measure a quantized model at each preset against its reference; schema.py describes the result.

    Both models run in this process, or in the workers of `share`; they may be the same one. Text runs once for the
    reference however many presets there are. `sizes` (preset -> bits per weight, bytes, ...) is passed through; `shown`
    sample answers are kept; `breakdown` also asks what the flipped token does and what the quantized model does after
    it.
    Raises PolybitError when the vocabularies differ or a model gives NaN.
    """
    if not presets:
        raise PolybitError("No precision was given to compare; name at least one, such as w4.")
    share = share or Here(reference, quantized)
    seen = read_both(reference, quantized, presets, material, seed=seed, share=share)
    tasks = task_numbers(share, presets, material.tasks, seed=seed)
    flipped = flips_broken_down(presets, seen, material.max_tokens, seed, share) if breakdown else {}
    result: dict[str, Any] = {"reference": {"tasks": tasks[REF]}, "presets": {}}
    if seen:
        first = seen[presets[0]]
        result["reference"] = {name: metric(first) for name, metric in REFERENCE.items()} | result["reference"]
        result |= amounts(first, material)
    for preset in presets:
        name = preset or AS_LOADED
        row = result["presets"][name] = {**(sizes or {}).get(name, {})}
        if seen:
            row |= {key: metric(seen[preset]) for key, metric in METRICS.items()}
        row["tasks"] = tasks[preset]
        if seen:
            row["answers"] = sample_answers(reference, seen[preset].answers, shown)
        if preset in flipped:
            row["breakdown"] = flipped[preset]
    return result


def flips_broken_down(
    presets: Sequence[str | None],
    seen: Mapping[str | None, PairedReading],
    max_tokens: int,
    seed: int,
    share: Share,
) -> dict[str | None, Any]:
    """What the flipped token does at each preset, where there are answers."""
    asked = [preset for preset in presets if preset in seen and seen[preset].answers.prompts]
    parts = [(preset, seen[preset].answers, max_tokens, seed) for preset in asked]
    return dict(zip(asked, share(flip_breakdown, parts, "breakdown"), strict=True))


def amounts(seen: PairedReading, material: EvalMaterial) -> dict[str, Any]:
    """How much text was read, tokens = predicted ones, and how many prompts were answered."""
    assert material.windows_NT is not None
    windows, length = material.windows_NT.shape
    return {
        "text": {"windows": windows, "window_tokens": length, "tokens": len(seen.text.reference.text_N)},
        "prompts": {"n": len(seen.answers.prompts), "max_tokens": material.max_tokens},
    }


def read_both(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    material: EvalMaterial,
    *,
    seed: int,
    share: Share | None = None,
) -> dict[str | None, PairedReading]:
    """What both models say on the text, freely, and on the float model's own answers; empty where there is no text."""
    if material.windows_NT is None:
        return {}
    batches = text_batches(_narrower(reference, quantized), material.windows_NT)
    share = share or Here(reference, quantized)
    text, tables = measure_tokens(reference, quantized, presets, batches, label="text", share=share)
    answers = answer_prompts(reference, quantized, presets, material, share)
    own, own_tables = _own_answers(reference, quantized, presets, answers, share)
    return {
        preset: PairedReading(
            PairedTokens(text, tables[preset]),
            None if own is None else PairedTokens(own, own_tables[preset]),
            answers[preset],
            material.max_tokens,
            seed,
        )
        for preset in presets
    }


def _narrower(reference: LocalLM, quantized: LocalLM) -> LocalLM:
    """The model that takes fewer rows at a time."""
    return min(reference, quantized, key=lambda lm: (lm.batch_logits, lm.batch_tokens))


def answer_prompts(
    reference: LocalLM, quantized: LocalLM, presets: Sequence[str | None], material: EvalMaterial, share: Share
) -> dict[str | None, PairedAnswers]:
    """Let both models answer every prompt freely; both see the same tokens, cut to fit the shorter context."""
    if not material.prompts:
        return {preset: PairedAnswers() for preset in presets}
    rooms = [lm.max_length - material.max_tokens for lm in (reference, quantized) if lm.max_length is not None]
    if rooms and min(rooms) < 1:
        raise PolybitError(
            f"max_tokens {material.max_tokens} leaves no room for a prompt in a context of "
            f"{min(rooms) + material.max_tokens} tokens; ask for fewer."
        )
    prompts = [encode_prompt(reference.tokenizer, prompt) for prompt in material.prompts]
    prompts = [prompt[-min(rooms) :] if rooms else prompt for prompt in prompts]
    pieces, length = cut(prompts, ANSWERS), material.max_tokens
    who = [(True, None, "reference"), *((False, preset, preset or AS_LOADED) for preset in presets)]
    parts: list[Part] = [(float_, p, piece, length, f"answers, {name}") for float_, p, name in who for piece in pieces]
    theirs, *ours = joined(share(said, parts, "answers"), len(pieces))
    return {preset: PairedAnswers(prompts, theirs, mine) for preset, mine in zip(presets, ours, strict=True)}


def _own_answers(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    answers: Mapping[str | None, PairedAnswers],
    share: Share,
) -> tuple[ReferenceTokens | None, dict[str | None, QuantizedTokens]]:
    """The token comparison, teacher-forced on the float model's answers.

    The float model's choice is read again in the same pass: rounding may differ between decoding token by token and
    scoring at once, and such a difference is no flip.
    """
    first = answers[presets[0]]
    if not first.prompts:
        return None, {}
    batches = answer_batches(_narrower(reference, quantized), first.prompts, first.reference)
    return measure_tokens(reference, quantized, presets, batches, label="own answers", share=share)


def task_numbers(
    share: Share, presets: Sequence[str | None], tasks: Mapping[str, Sequence[tasks_of.TaskItem]], *, seed: int
) -> dict[str | None, dict[str, Any]]:
    """Scores of the reference (under REF) and of every preset for every task, with the seals of their predictions."""
    predicted = predict_tasks(share, presets, tasks)
    # every prediction is sealed by now; only from here on are right answers read
    scores = {
        preset: {name: tasks_of.score(found, tasks_of.gold(tasks[name])) for name, found in row.items()}
        for preset, row in predicted.items()
    }
    found: dict[str | None, dict[str, Any]] = {
        REF: {name: _plain(tasks_of.summarize(row, seed=seed)) for name, row in scores[REF].items()}
    }
    for preset in presets:
        found[preset] = {
            name: paired_scores(name, scores[REF][name], row, seed=seed) for name, row in scores[preset].items()
        }
    return {
        preset: {name: {**row, "predictions_sha256": predicted[preset][name].sha256} for name, row in rows.items()}
        for preset, rows in found.items()
    }


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in estimates.items()}


def predict_tasks(
    share: Share, presets: Sequence[str | None], tasks: Mapping[str, Sequence[tasks_of.TaskItem]]
) -> dict[str | None, dict[str, tasks_of.Predictions]]:
    """Sealed predictions of the reference and of every preset for every task; sees questions only."""
    asked = {name: tasks_of.questions(items) for name, items in tasks.items() if items}
    who = [(REF, True, None), *((preset, False, preset) for preset in presets)]
    parts = [(of_reference, preset, *row) for _, of_reference, preset in who for row in asked.items()]
    answers = iter(share(tasks_of.predicted, parts, "tasks"))
    return {key: {name: next(answers) for name in asked} for key, _, _ in who}


def paired_scores(task: str, reference: tasks_of.Scores, quantized: tasks_of.Scores, *, seed: int) -> dict[str, Any]:
    """Scores at one preset, their paired differences to the reference, and the answers that flipped."""
    difference = {
        name: bootstrap(values.astype(float), paired_with=reference[name].astype(float), seed=seed)
        for name, values in quantized.items()
    }
    return {
        **_plain(tasks_of.summarize(quantized, seed=seed)),
        "difference": _plain(difference),
        **_plain(tasks_of.answer_flips(task, reference, quantized, seed=seed)),
    }


def sample_answers(lm: LocalLM, answers: PairedAnswers, shown: int) -> list[dict[str, Any]]:
    """A few answers of both models side by side: those that part, in the order of the prompts, then identical ones."""
    rows = zip(answers.stars, answers.prompts, answers.reference, answers.quantized, strict=True)
    ranked = sorted(rows, key=lambda row: row[0] is None)[:shown]  # stable: the order of the prompts stays
    return [
        {
            "prompt": lm.decode(prompt),
            "reference": lm.decode(theirs, after=prompt),
            "quantized": lm.decode(ours, after=prompt),
            "first_difference_token": star,
            "tokens_reference": lm.pieces(theirs, after=prompt),
            "tokens_quantized": lm.pieces(ours, after=prompt),
        }
        for star, prompt, theirs, ours in ranked
    ]
