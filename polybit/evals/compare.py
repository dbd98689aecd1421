"""One quantized model at all its precisions against its float model: everything `polybit eval` reports.

The contract of what `compare` returns, which is the `numbers` of `polybit eval --json`; E is an estimate
{"value", "low", "high", "n"}: a mean, its 95 % bootstrap interval, and how many windows or items were resampled.

    {"reference": {"perplexity": E, "margin": E, "entropy": E (nats), "tasks": {TASK: {METRIC: E,
                   "predictions_sha256"}}},
     "text": {"windows", "window_tokens", "tokens"},         how much text; tokens = predicted tokens
     "prompts": {"n", "max_tokens"},                         how many prompts were answered
     "presets": {NAME: {
        ...sizes[NAME],                                      bits_per_weight, bytes: whatever the caller knows
        "perplexity": E, "delta_nll": E,                     nats per token, paired with the reference
        "kl": E, "kl_p999": number,                          KL(float || quantized), nats per token; 99.9th percentile
        "top1": E, "flips_text": E,                          both models' likeliest token agrees / differs, on the text
        "flips": E | null,                                   the same, teacher-forced on the float model's own answers
        "margins": {"edges", "reference", "quantized", "reference_mean": E, "quantized_mean": E, "difference": E},
        "flips_by_margin_decile": [{"from", "to", "value", "low", "high", "n"} x 10],
        "flips_by_entropy_decile": [the same by the float model's entropy],
        "first_divergence": E | null,                        tokens both greedy answers share before they part
        "identical": E | null,                               share of answers that never part
        "survival", "survival_low", "survival_high": [P(t* > k) for k = 0 .. max_tokens - 1] | [],
        "tasks": {TASK: {METRIC: E, "difference": {METRIC: E}, "flips": E, "correct_to_wrong": E,
                         "wrong_to_correct": E, "predictions_sha256"}},
        "answers": [{"prompt", "reference", "quantized", "first_difference_token": int | null,
                     "tokens_reference": [str], "tokens_quantized": [str]}],
        "breakdown": what evals.breakdown returns, only when asked for}}}

Shares and scores are 0..1. `margins` counts texts per bin of their mean margin; `edges` has one entry more. Decile
rows run from the smallest margin or entropy of the float model to the largest, over the tokens of the text. Values
that need prompts are null or empty without them. `answers` shows answers that part before identical ones. A preset
given as None is reported as "as loaded".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from polybit.core.records import Estimate
from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt, encode_prompt
from polybit.evals import tasks as tasks_of
from polybit.evals.breakdown import flip_breakdown
from polybit.evals.scoring import bootstrap, exponentiate
from polybit.evals.token_flip import (
    QuantizedTokens,
    ReferenceTokens,
    answer_batches,
    first_divergence,
    flips_by,
    margin_summary,
    measure_tokens,
    survival,
    text_batches,
)
from polybit.hub.lm import LocalLM

AS_LOADED = "as loaded"
REF = "the reference"  # key of the reference beside the presets; no precision can be written like this


@dataclass(frozen=True, slots=True)
class Material:
    """What two models are compared on: windows of text [N, T], prompts to answer freely, tasks with right answers."""

    windows_NT: Tensor
    prompts: Sequence[Prompt] = ()
    tasks: Mapping[str, Sequence[tasks_of.Item]] = field(default_factory=dict)
    max_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Answers:
    """Greedy answers to the prompts as token ids: the float model's, and each preset's."""

    prompts: list[list[int]]
    reference: list[list[int]]
    quantized: dict[str | None, list[list[int]]]


def compare(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    material: Material,
    *,
    sizes: Mapping[str, Mapping[str, Any]] | None = None,
    shown: int = 6,
    breakdown: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a quantized model at each preset against its reference; the result's schema is at the top of this file.

    Both models run in this process; they may be the same one. Text runs once for the reference however many presets
    there are. `sizes` (preset -> bits per weight, bytes, ...) is passed through; `shown` sample answers are kept;
    `breakdown` also asks what the flipped token does and what the quantized model does after it.
    Raises PolybitError when the vocabularies differ or a model gives NaN.
    """
    if not presets:
        raise PolybitError("No precision was given to compare; name at least one, such as w4.")
    tokens, tables = measure_tokens(
        reference, quantized, presets, text_batches(_narrower(reference, quantized), material.windows_NT), label="text"
    )
    answers = answer_prompts(reference, quantized, presets, material)
    own, own_tables = _own_answers(reference, quantized, presets, answers)
    predicted = predict_tasks(reference, quantized, presets, material.tasks)
    # every prediction is sealed by now; only from here on are right answers read
    scores = {
        preset: {name: tasks_of.score(found, tasks_of.gold(material.tasks[name])) for name, found in row.items()}
        for preset, row in predicted.items()
    }
    result: dict[str, Any] = {
        "reference": {
            **reference_numbers(tokens, seed=seed),
            "tasks": {
                name: {
                    **_plain(tasks_of.summarize(found, seed=seed)),
                    "predictions_sha256": predicted[REF][name].sha256,
                }
                for name, found in scores[REF].items()
            },
        },
        "text": {
            "windows": len(material.windows_NT),
            "window_tokens": material.windows_NT.shape[1],
            "tokens": len(tokens.text_N),
        },
        "prompts": {"n": len(answers.prompts), "max_tokens": material.max_tokens},
        "presets": {},
    }
    for preset in presets:
        name = preset or AS_LOADED
        flips = None
        if own is not None:
            flips = bootstrap(~own_tables[preset].agrees_N, clusters=own.text_N, seed=seed).to_json()
        result["presets"][name] = {
            **(sizes or {}).get(name, {}),
            **text_numbers(tokens, tables[preset], seed=seed),
            "flips": flips,
            **divergence_numbers(answers.reference, answers.quantized[preset], material.max_tokens, seed=seed),
            "tasks": {
                task: {
                    **task_numbers(task, scores[REF][task], scores[preset][task], seed=seed),
                    "predictions_sha256": predicted[preset][task].sha256,
                }
                for task in predicted[REF]
            },
            "answers": sample_answers(reference, answers, preset, shown),
        }
        if breakdown and answers.prompts:
            result["presets"][name]["breakdown"] = flip_breakdown(
                reference,
                quantized,
                preset,
                answers.prompts,
                answers.reference,
                answers.quantized[preset],
                max_tokens=material.max_tokens,
                seed=seed,
            )
    return result


def _narrower(reference: LocalLM, quantized: LocalLM) -> LocalLM:
    """The model that takes fewer rows at a time."""
    return min(reference, quantized, key=lambda lm: (lm.batch_logits, lm.batch_tokens))


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in estimates.items()}


def reference_numbers(tokens: ReferenceTokens, *, seed: int) -> dict[str, Any]:
    """Perplexity, margin and entropy (nats) of the float model on the text."""
    nll, margin, entropy = (
        bootstrap(values, clusters=tokens.text_N, seed=seed)
        for values in (tokens.nll_N, tokens.margin_N, tokens.entropy_N)
    )
    return _plain({"perplexity": exponentiate(nll), "margin": margin, "entropy": entropy})


def text_numbers(reference: ReferenceTokens, tokens: QuantizedTokens, *, seed: int) -> dict[str, Any]:
    """All that is measured on the text at one preset, each mean resampled by window."""

    def mean(values: NDArray[Any], paired_with: NDArray[Any] | None = None) -> Estimate:
        return bootstrap(values, paired_with=paired_with, clusters=reference.text_N, seed=seed)

    return {
        **_plain(
            {
                "perplexity": exponentiate(mean(tokens.nll_N)),
                "delta_nll": mean(tokens.nll_N, reference.nll_N),
                "kl": mean(tokens.kl_N),
                "top1": mean(tokens.agrees_N),
                "flips_text": mean(~tokens.agrees_N),
            }
        ),
        "kl_p999": float(np.quantile(tokens.kl_N, 0.999)),
        "margins": margin_summary(reference, tokens, seed=seed),
        "flips_by_margin_decile": flips_by(reference.margin_N, tokens, reference.text_N, seed=seed),
        "flips_by_entropy_decile": flips_by(reference.entropy_N, tokens, reference.text_N, seed=seed),
    }


def answer_prompts(
    reference: LocalLM, quantized: LocalLM, presets: Sequence[str | None], material: Material
) -> Answers:
    """Let both models answer every prompt freely; both see the same tokens, cut to fit the shorter context."""
    if not material.prompts:
        return Answers([], [], {preset: [] for preset in presets})
    rooms = [lm.max_length - material.max_tokens for lm in (reference, quantized) if lm.max_length is not None]
    if rooms and min(rooms) < 1:
        raise PolybitError(
            f"max_tokens {material.max_tokens} leaves no room for a prompt in a context of "
            f"{min(rooms) + material.max_tokens} tokens; ask for fewer."
        )
    prompts = [encode_prompt(reference.tokenizer, prompt) for prompt in material.prompts]
    prompts = [prompt[-min(rooms) :] if rooms else prompt for prompt in prompts]
    theirs = reference.generate_tokens(prompts, max_tokens=material.max_tokens, label="answers, reference")
    ours = {}
    for preset in presets:
        with quantized.at(preset):
            ours[preset] = quantized.generate_tokens(
                prompts, max_tokens=material.max_tokens, label=f"answers, {preset or AS_LOADED}"
            )
    return Answers(prompts, theirs, ours)


def _own_answers(
    reference: LocalLM, quantized: LocalLM, presets: Sequence[str | None], answers: Answers
) -> tuple[ReferenceTokens | None, dict[str | None, QuantizedTokens]]:
    """The token comparison, teacher-forced on the float model's answers.

    The float model's choice is read again in the same pass: rounding may differ between decoding token by token and
    scoring at once, and such a difference is no flip.
    """
    if not answers.prompts:
        return None, {}
    batches = answer_batches(_narrower(reference, quantized), answers.prompts, answers.reference)
    return measure_tokens(reference, quantized, presets, batches, label="own answers")


def divergence_numbers(
    reference: Sequence[Sequence[int]], quantized: Sequence[Sequence[int]], max_tokens: int, *, seed: int
) -> dict[str, Any]:
    """First divergence, share of identical answers, survival curve; nulls without prompts."""
    if not reference:
        empty: dict[str, Any] = {"survival": [], "survival_low": [], "survival_high": []}
        return {"first_divergence": None, "identical": None, **empty}
    stars = [first_divergence(theirs, ours) for theirs, ours in zip(reference, quantized, strict=True)]
    shared = [len(theirs) if star is None else star for star, theirs in zip(stars, reference, strict=True)]
    identical = np.array([star is None for star in stars])
    return {
        "first_divergence": bootstrap(shared, seed=seed).to_json(),
        "identical": bootstrap(identical, seed=seed).to_json(),
        **survival(stars, max_tokens, seed=seed),
    }


def predict_tasks(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    tasks: Mapping[str, Sequence[tasks_of.Item]],
) -> dict[str | None, dict[str, tasks_of.Predictions]]:
    """Sealed predictions of the reference and of every preset for every task; sees questions only."""
    asked = {name: tasks_of.questions(items) for name, items in tasks.items() if items}
    found: dict[str | None, dict[str, tasks_of.Predictions]] = {
        REF: {name: tasks_of.predict(reference, name, questions) for name, questions in asked.items()}
    }
    for preset in presets:
        with quantized.at(preset):
            found[preset] = {name: tasks_of.predict(quantized, name, questions) for name, questions in asked.items()}
    return found


def task_numbers(task: str, reference: tasks_of.Scores, quantized: tasks_of.Scores, *, seed: int) -> dict[str, Any]:
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


def sample_answers(lm: LocalLM, answers: Answers, preset: str | None, shown: int) -> list[dict[str, Any]]:
    """A few answers of both models side by side: those that part, in the order of the prompts, then identical ones."""
    rows = []
    for prompt, theirs, ours in zip(answers.prompts, answers.reference, answers.quantized[preset], strict=True):
        rows.append((first_divergence(theirs, ours), prompt, theirs, ours))
    rows = sorted(rows, key=lambda row: row[0] is None)[:shown]  # stable: the order of the prompts stays
    return [
        {
            "prompt": lm.decode(prompt),
            "reference": lm.decode(theirs, after=prompt),
            "quantized": lm.decode(ours, after=prompt),
            "first_difference_token": star,
            "tokens_reference": lm.pieces(theirs, after=prompt),
            "tokens_quantized": lm.pieces(ours, after=prompt),
        }
        for star, prompt, theirs, ours in rows
    ]
