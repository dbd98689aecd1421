"""SQuAD and its kin: answers are frozen to disk before a reference is read, then scored as the official scripts do.

A model answers in one of two ways, `generative` (free text that ends with EOS) or `spans` (a start and an end in the
text). Both see questions only. `run` writes what they said to a sealed file, and only then asks for right answers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polybit.core.records import Estimate
from polybit.core.runtime import PolybitError, write_json
from polybit.data.spans import Window, prompt_windows, span_windows
from polybit.data.squad import Answer, Asked, SquadFile, choose
from polybit.evals.scoring import PUNCTUATION, bootstrap, normalize_answer
from polybit.evals.sharing import Share, cut, joined
from polybit.evals.tasks import Predictions
from polybit.hub.lm import LocalLM, cut_at
from polybit.hub.span import SpanReader

Answerer = Callable[[Sequence[Asked]], list[str]]
SquadView = LocalLM | SpanReader
Scores = dict[str, NDArray[Any]]
N_BEST, LONGEST_ANSWER = 20, 30  # candidates each for start and end, tokens of an answer, as in run_qa of transformers


class AnswerSource(Protocol):
    """Where questions come from; `answers` is asked only after every prediction is on disk."""

    def answers(self) -> Mapping[str, Sequence[Answer]]:
        """Right answers by question id, none where the text holds none."""
        ...


# answering -----------------------------------------------------------------------------------------------------


def generative(lm: LocalLM, *, max_tokens: int = 24, stride: int = 128) -> Answerer:
    """Answer in free text, greedily, until EOS or the end of the line.

    A text longer than the model's context is read in overlapping windows with the whole question in each; the answer
    with the highest mean log-probability counts.
    """

    def answer(asked: Sequence[Asked]) -> list[str]:
        room = None if lm.max_length is None else lm.max_length - max_tokens
        rows = [
            (n, ids)
            for n, one in enumerate(asked)
            for ids in prompt_windows(lm.tokenizer, one, room=room, stride=stride)
        ]
        said = lm.generate_tokens([ids for _, ids in rows], max_tokens=max_tokens, stop=("\n",), label="answers")
        several = Counter(number for number, _ in rows)
        best: dict[int, tuple[float, str]] = {}
        for (number, ids), tokens in zip(rows, said, strict=True):
            text = cut_at(lm.decode(tokens, after=ids).lstrip("\n"), ("\n",)).strip()
            rank = mean_log_probability(lm, ids, tokens) if several[number] > 1 else 0.0
            if number not in best or rank > best[number][0]:
                best[number] = rank, text
        return [best[number][1] for number in range(len(asked))]

    return answer


def mean_log_probability(lm: LocalLM, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Nats per token of what a model said after a prompt, EOS included."""
    ids_BT = torch.tensor([[*prompt, *tokens]])
    logp_TV = lm.logits(ids_BT[:, :-1])[0, len(prompt) - 1 :].log_softmax(-1)
    return float(logp_TV.gather(-1, ids_BT[0, len(prompt) :, None].to(logp_TV.device)).mean())


def spans(
    reader: SpanReader, *, length: int | None = None, stride: int = 128, null_threshold: float | None = None
) -> Answerer:
    """Answer with the best span of the text over all its windows.

    null_threshold: None = always answer (SQuAD 1.1); a number = say nothing when the score of the first token beats
    the best span by more than it (SQuAD 2.0, BERT §4.3).
    """
    window = min(length or 384, reader.max_length or 384)

    def answer(asked: Sequence[Asked]) -> list[str]:
        windows = span_windows(reader.tokenizer, asked, length=window, stride=stride)
        scored = reader.scores([one.ids for one in windows])
        best = [(-np.inf, "")] * len(asked)
        null = [np.inf] * len(asked)
        for one, (start_T, end_T) in zip(windows, scored, strict=True):
            score, text = best_span(one, start_T, end_T, asked[one.asked].context)
            best[one.asked] = max(best[one.asked], (score, text), key=lambda pair: pair[0])
            null[one.asked] = min(null[one.asked], float(start_T[0] + end_T[0]))
        silent = [null_threshold is not None and n - b[0] > null_threshold for n, b in zip(null, best, strict=True)]
        return ["" if quiet else text for quiet, (_, text) in zip(silent, best, strict=True)]

    return answer


def best_span(window: Window, start_T: Tensor, end_T: Tensor, context: str, n_best: int = N_BEST) -> tuple[float, str]:
    """The likeliest answer inside the context of one window: (score, text); score -inf where there is no span.

    The n_best likeliest starts and ends are paired; an end before its start, an answer of more than LONGEST_ANSWER
    tokens, and tokens outside the context are left out.
    """
    inside = torch.tensor([place is not None for place in window.offsets])
    outside_T = torch.where(inside, 0.0, -torch.inf)
    starts, ends = ((values + outside_T).topk(min(n_best, len(values))).indices.tolist() for values in (start_T, end_T))
    best = (-np.inf, "")
    for first in starts:
        for last in ends:
            opening, closing = window.offsets[first], window.offsets[last]
            if opening is None or closing is None or not 0 <= last - first < LONGEST_ANSWER:
                continue
            score = float(start_T[first] + end_T[last])
            if score > best[0]:
                best = score, context[opening[0] : closing[1]]
    return best


# freezing ------------------------------------------------------------------------------------------------------


def freeze(predictions: Predictions, path: Path) -> Path:
    """Write sealed predictions; an existing file is replaced whole."""
    rows = dict(zip(predictions.ids, predictions.texts, strict=True))
    write_json(path, {"task": predictions.task, "sha256": predictions.sha256, "predictions": rows})
    return path


def thaw(path: Path) -> Predictions:
    """Read frozen predictions back, refused when they were changed since."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        rows = value["predictions"]
        found = Predictions(value["task"], tuple(rows), tuple(rows.values()))
        seal = value["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolybitError(f"{path} holds no predictions ({error!s:.80}): predict again") from None
    if found.sha256 != seal:
        raise PolybitError(f"the predictions in {path} were changed after they were made: predict again")
    return found


def run(
    answerer: Answerer, asked: Sequence[Asked], source: AnswerSource, path: Path, *, korean: bool = False
) -> Scores:
    """Answer, freeze, and only then read the right answers and score: arrays per question, in order."""
    freeze(Predictions("squad", tuple(one.id for one in asked), tuple(answerer(asked))), path)
    return score(thaw(path), source.answers(), korean=korean)


# scoring -------------------------------------------------------------------------------------------------------


def score(predictions: Predictions, answers: Mapping[str, Sequence[Answer]], *, korean: bool = False) -> Scores:
    """Exact match and F1 of every question, the best over its right answers, and whether it has one at all."""
    predictions.check_seal()
    missing = [name for name in predictions.ids if name not in answers]
    if missing:
        raise PolybitError(
            f"{len(missing)} of {len(predictions.ids)} questions have no right answer, first {missing[0]!r:.60}: "
            "score them with the file they were asked from"
        )
    normalize = normalize_korean if korean else normalize_answer
    exact, overlap = [], []
    for name, text in zip(predictions.ids, predictions.texts, strict=True):
        right = [normalize(answer.text) for answer in answers[name]]
        right = [answer for answer in right if answer] or [""]
        said = normalize(text)
        exact.append(said in right)
        overlap.append(max(f1(pieces(said, korean), pieces(answer, korean)) for answer in right))
    has = [bool(answers[name]) for name in predictions.ids]
    return {"em": np.array(exact), "f1": np.array(overlap), "has_answer": np.array(has)}


def pieces(text: str, korean: bool) -> list[str]:
    """What F1 compares: words, in Korean characters."""
    return list(text.replace(" ", "")) if korean else text.split()


def f1(said: Sequence[str], right: Sequence[str]) -> float:
    """Overlap of two bags of words (or characters); where one is empty 1 when both are (evaluate-v2.0)."""
    if not said or not right:
        return float(list(said) == list(right))
    same = sum((Counter(said) & Counter(right)).values())
    return 2 * same / (len(said) + len(right))


def normalize_korean(text: str) -> str:
    """KorQuAD 1.0's normaliser: quotes and brackets become blanks, then lower case, no punctuation, single blanks."""
    text = re.sub("['\"《》<>〈〉()‘’]", " ", text).lower()
    return " ".join("".join(character for character in text if character not in PUNCTUATION).split())


def summarize(scores: Scores, *, seed: int = 0) -> dict[str, Estimate]:
    """Mean exact match and F1, 0..1 with intervals; apart for questions with and without an answer where both occur."""
    has = scores["has_answer"].astype(bool)
    found = {name: bootstrap(scores[name], seed=seed) for name in ("em", "f1")}
    if 0 < has.sum() < len(has):
        for label, part in (("has_answer", has), ("no_answer", ~has)):
            found |= {f"{name}_{label}": bootstrap(scores[name][part], seed=seed) for name in ("em", "f1")}
    return found


def differences(scores: Scores, reference: Scores, *, seed: int = 0) -> dict[str, Estimate]:
    """Exact match and F1 minus the reference's, question by question."""
    return {
        name: bootstrap(scores[name].astype(float), paired_with=reference[name].astype(float), seed=seed)
        for name in ("em", "f1")
    }


# models side by side -------------------------------------------------------------------------------------------


def answered(
    reference: SquadView,
    quantized: SquadView,
    of_reference: bool,
    preset: str | None,
    asked: Sequence[Asked],
    threshold: float | None,
) -> list[str]:
    """Answers of one of two models, the quantized one at a preset."""
    lm = reference if of_reference else quantized
    with lm.at(None if of_reference else preset) as view:
        return (spans(view, null_threshold=threshold) if isinstance(view, SpanReader) else generative(view))(asked)


def given(texts: list[str]) -> Answerer:
    """Answers that were given already."""
    return lambda asked: texts


def compare_squad(
    views: Mapping[str, tuple[bool, str | None]],
    share: Share,
    file: SquadFile,
    folder: Path,
    *,
    count: int | None = None,
    head: str = "generate",
    reference: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """EM and F1 of every view (label -> (model, preset)), and their paired differences to the reference's label.

    views: label -> (whether the reference is meant, preset) · share: who answers · count: questions drawn at random,
    None = all. Predictions are frozen as `folder/LABEL.json`.
    {"file", "head", "questions", "predictions", "scores": {LABEL: {"em": E, "f1": E, "difference": {...}}}}.
    """
    asked = choose(file.questions(), count, seed)
    korean = "korquad" in file.version().lower()
    threshold = 0.0 if file.version().startswith("v2") else None
    pieces = cut(asked)
    told = [(*view, part, threshold) for view in views.values() for part in pieces]
    said = joined(share(answered, told, "answers"), len(pieces))
    scores = {}
    for label, texts in zip(views, said, strict=True):
        scores[label] = run(given(texts), asked, file, folder / f"{label}.json", korean=korean)
    rows: dict[str, Any] = {}
    for label, values in scores.items():
        rows[label] = {name: estimate.to_json() for name, estimate in summarize(values, seed=seed).items()}
        if reference is not None and label != reference:
            paired = differences(values, scores[reference], seed=seed)
            rows[label]["difference"] = {name: estimate.to_json() for name, estimate in paired.items()}
    return {
        "file": file.name,
        "head": head,
        "questions": len(asked),
        "predictions": str(folder),
        "scores": rows,
    }
