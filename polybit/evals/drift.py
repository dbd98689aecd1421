"""Long conversations: how the quantized model's answers move away from the float model's, turn by turn.

Twice: each model with its own answers in the history (errors add up, as for a user), and the quantized model with the
float model's answers in its history (each turn starts afresh, so what grows here is the cost of length alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polybit.core.runtime import PolybitError
from polybit.data import synth
from polybit.data.rows import read_rows
from polybit.data.turns import CHAT_KEYS, read_messages
from polybit.evals.conversation import Talk, converse
from polybit.evals.fidelity import prefix_share, rouge_l
from polybit.evals.scoring import bootstrap
from polybit.evals.sharing import Here, Share
from polybit.evals.token_flip import answer_batches, measure_tokens
from polybit.hub.lm import LocalLM

TALK_SEED = 30_000  # seed of the embedded conversations asked here; no recipe trains or chooses with them
GRAM = 4  # tokens of a run that counts as repeated


def scripts_from(conversations: Sequence[Sequence[dict[str, str]]], turns: int) -> list[list[str]]:
    """Scripts of exactly `turns` user messages: the user's side of conversations, joined until full."""
    scripts: list[list[str]] = []
    script: list[str] = []
    for messages in conversations:
        script += [message["content"] for message in messages if message["role"] == "user"]
        if len(script) >= turns:
            scripts.append(script[:turns])
            script = []
    if not scripts:
        raise PolybitError(
            f"The conversations hold {len(script)} user messages, fewer than one talk of {turns} turns needs."
        )
    return scripts


def talk_scripts(source: str | None, *, count: int, turns: int, seed: int = 0) -> list[list[str]]:
    """Scripts of a .jsonl of conversations, None = of the embedded generator; at most `count`."""
    if source is None:
        conversations = synth.conversations(count * turns, TALK_SEED + seed, split="test")
    else:
        conversations = []
        for n, row in enumerate(read_rows(source), start=1):
            key = next((key for key in CHAT_KEYS if key in row), CHAT_KEYS[0])
            conversations.append(read_messages(row.get(key), f"Row {n} of {source!r}, {key!r},"))
    return scripts_from(conversations, turns)[:count]


def repeated_share(answer: Sequence[int], earlier: set[tuple[int, ...]]) -> float:
    """Share of an answer's runs of four tokens that stood in earlier answers or earlier in this one; 0 when too short.

    Adds the answer's runs to `earlier`.
    """
    runs = [tuple(answer[n : n + GRAM]) for n in range(len(answer) - GRAM + 1)]
    repeated = 0
    for run in runs:
        repeated += run in earlier
        earlier.add(run)
    return repeated / len(runs) if runs else 0.0


def drift(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    scripts: Sequence[Sequence[str]],
    *,
    max_tokens: int,
    seed: int = 0,
    share: Share | None = None,
) -> dict[str, Any]:
    """Drift at each preset over conversations of equal length; whole conversations are resampled.

    {"conversations", "turns", "dropped_by_turn", "reference": {"repeated": [E per turn]}, "presets": {NAME: {"own": C,
    "given": C, "flips": [E per turn], "flips_change": E}}} with C = {"rouge_l", "same", "prefix", "repeated",
    "length_ratio": [E per turn], "change": {the same keys: E}}. change: mean of the last quarter of the turns minus
    that of the first, paired. own: own history · given: the float model's history · flips: teacher-forced on the float
    model's talk. dropped_by_turn: mean number of oldest exchanges left out, because the context is full. share: who
    talks (default: this process).
    """
    turns = len(scripts[0])
    if any(len(script) != turns for script in scripts):
        raise PolybitError("Talks of different lengths cannot be averaged turn by turn; cut them to one length.")
    share = share or Here(reference, quantized)
    [base] = share(talked, [(True, None, scripts, None, max_tokens, "float")])
    found: dict[str, Any] = {
        "conversations": len(scripts),
        "turns": turns,
        "dropped_by_turn": np.mean(base.dropped, axis=0).tolist(),
        "reference": {"repeated": per_turn(matrix(base, repetition), seed)},
        "presets": {},
    }
    prompts = [ids for talk in base.prompts for ids in talk]
    answers = [ids for talk in base.tokens for ids in talk]
    own_flips = turn_flips(reference, quantized, presets, prompts, answers, turns, share)
    parts = [
        (False, preset, scripts, given, max_tokens, f"{preset or 'as loaded'}, {whose} history")
        for preset in presets
        for whose, given in (("own", None), ("float", base.texts))
    ]
    talks = iter(share(talked, parts, "talks"))
    for preset in presets:
        name, own, given = preset or "as loaded", next(talks), next(talks)
        flips_NT = own_flips[preset]
        found["presets"][name] = {
            "own": against(base, own, seed=seed),
            "given": against(base, given, seed=seed),
            "flips": per_turn(flips_NT, seed),
            "flips_change": change(flips_NT, seed),
        }
    return found


def talked(
    reference: LocalLM,
    quantized: LocalLM,
    of_reference: bool,
    preset: str | None,
    scripts: Sequence[Sequence[str]],
    given: Sequence[Sequence[str]] | None,
    max_tokens: int,
    label: str,
) -> Talk:
    """`converse` with one of two models, the quantized one at a preset."""
    lm = reference if of_reference else quantized
    with lm.at(None if of_reference else preset):
        return converse(lm, scripts, max_tokens=max_tokens, given=given, label=label)


def turn_flips(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    turns: int,
    share: Share,
) -> dict[str | None, NDArray[np.float64]]:
    """Share of flipped tokens in every answer of the float model, [conversations, turns], at each preset."""
    batches = answer_batches(reference, prompts, answers)
    tokens, tables = measure_tokens(reference, quantized, presets, batches, label="flips by turn", share=share)
    total = len(answers)
    counts_N = np.bincount(tokens.text_N, minlength=total)
    return {
        preset: (np.bincount(tokens.text_N, weights=~table.agrees_N, minlength=total) / counts_N).reshape(-1, turns)
        for preset, table in tables.items()
    }


def against(base: Talk, other: Talk, *, seed: int) -> dict[str, Any]:
    """Every measure of one talk against the float model's, per turn and as a change over the talk."""
    measures: dict[str, NDArray[np.float64]] = {
        "rouge_l": both(base, other, rouge_l),
        "prefix": both(base, other, prefix_share),
        "same": both(base, other, lambda a, b: float(list(a) == list(b))),
        "length_ratio": both(base, other, lambda a, b: len(b) / max(1, len(a))),
        "repeated": matrix(other, repetition),
    }
    return {
        **{name: per_turn(values_NT, seed) for name, values_NT in measures.items()},
        "change": {name: change(values_NT, seed) for name, values_NT in measures.items()},
    }


def both(base: Talk, other: Talk, measure: Callable[[Sequence[int], Sequence[int]], float]) -> NDArray[np.float64]:
    """A measure of (float answer, other answer), [conversations, turns]."""
    pairs = zip(base.tokens, other.tokens, strict=True)
    return np.array([[measure(a, b) for a, b in zip(theirs, ours, strict=True)] for theirs, ours in pairs], dtype=float)


def matrix(talk: Talk, measure: Callable[[Sequence[Sequence[int]]], list[float]]) -> NDArray[np.float64]:
    """A measure of every answer of a conversation, [conversations, turns]."""
    return np.array([measure(answers) for answers in talk.tokens], dtype=float)


def repetition(answers: Sequence[Sequence[int]]) -> list[float]:
    """Repeated share of each answer, given all before it."""
    earlier: set[tuple[int, ...]] = set()
    return [repeated_share(answer, earlier) for answer in answers]


def per_turn(values_NT: NDArray[np.float64], seed: int) -> list[dict[str, Any]]:
    """An estimate for each turn."""
    return [bootstrap(values_N, seed=seed).to_json() for values_N in values_NT.T]


def change(values_NT: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """Last quarter of the turns minus the first, paired by conversation."""
    quarter = max(1, values_NT.shape[1] // 4)
    last_N, first_N = values_NT[:, -quarter:].mean(1), values_NT[:, :quarter].mean(1)
    return bootstrap(last_N, paired_with=first_N, seed=seed).to_json()
