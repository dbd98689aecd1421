"""Score a model on multiple choice by log-likelihood and on GSM8K by generation, paired over presets.

acc: the likeliest answer is right. acc_norm: likeliest per character, as in lm-eval. Unlike lm-eval, which takes the
first of equally likely answers, a tie with a wrong answer counts as wrong, so a model that knows nothing scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polybit.core.runtime import PolybitError
from polybit.evals.choices_data import AskedItem, ChoiceItem, Sum, ask, examples, pairs, read_items, texts
from polybit.evals.scoring import bootstrap, gsm8k_exact, last_number
from polybit.evals.sharing import Here, Share, cut
from polybit.hub.lm import LM, LocalLM, LogLik

Scores = dict[str, NDArray[np.bool_]]
GSM8K_TOKENS, GSM8K_STOP = 256, ("Question:",)


@dataclass(frozen=True, slots=True)
class ChoiceSet:
    """Items of one set, how they are asked, and the examples that stand before them (`shots` of `shown`)."""

    name: str
    items: Sequence[AskedItem]
    form: str | None = None
    shots: int = 0
    shown: Sequence[AskedItem] = ()

    def before(self, item: AskedItem) -> str:
        """The worked examples for an item."""
        return examples(self.shown, self.shots, item.group, self.form) if self.shots else ""

    @property
    def is_sums(self) -> bool:
        """Whether answers are generated."""
        return isinstance(self.items[0], Sum)


def choice_sets(
    sources: Sequence[str],
    *,
    shown: Sequence[str] = (),
    limit: int | None = None,
    form: str | None = None,
    shots: int = 0,
) -> list[ChoiceSet]:
    """The sets of several sources; `shown` names where the worked examples of each stand, if there are any."""
    names = [set_name(source, sources) for source in sources]
    return [
        ChoiceSet(name, read_items(source, limit=limit), form, shots, read_items(before) if before else ())
        for name, source, before in zip(names, sources, shown or [""] * len(sources), strict=True)
    ]


def set_name(source: str, others: Sequence[str]) -> str:
    """The last part of a path, with the directory before it where another set is called the same."""
    path = Path(source)
    plain = ("test", "dev", "val", "validation")
    same = [other for other in others if Path(other).stem == path.stem]
    return f"{path.parent.name}/{path.stem}" if len(same) > 1 or path.stem in plain else path.stem


def score(lm: LM, asked: ChoiceSet, *, label: str = "choices") -> Scores:
    """Right or wrong for every item, by metric: acc and acc_norm, or exact and flexible for GSM8K."""
    if asked.is_sums:
        return score_sums(lm, asked)
    items = [item for item in asked.items if isinstance(item, ChoiceItem)]
    requests = [pairs(item, asked.before(item), asked.form) for item in items]
    replies = iter(lm.loglik([pair for request in requests for pair in request], label=f"{asked.name}, {label}"))
    parts = [decide(item, [next(replies) for _ in item.answers], asked.form) for item in items]
    return {name: np.array([part[name] for part in parts], dtype=bool) for name in ("acc", "acc_norm")}


def decide(item: ChoiceItem, replies: Sequence[LogLik], form: str | None = None) -> dict[str, bool]:
    """Whether the right answer is strictly likelier than every answer with another text."""
    said = texts(item, form)
    lengths = np.array([len(text) for text in said])
    nats = np.array([reply.total_nats for reply in replies])
    rivals = [n for n, text in enumerate(said) if text != said[item.gold] or (item.prefixes and n != item.gold)]
    return {
        name: bool(all(values[item.gold] > values[n] for n in rivals))
        for name, values in (("acc", nats), ("acc_norm", nats / lengths))
    }


def score_sums(lm: LM, asked: ChoiceSet) -> Scores:
    """GSM8K: exact wants `#### n`, flexible takes the last number of the answer."""
    items = [item for item in asked.items if isinstance(item, Sum)]
    prompts = [asked.before(item) + ask(item) for item in items]
    said = lm.generate(prompts, max_tokens=GSM8K_TOKENS, stop=GSM8K_STOP)
    wanted = [item.answer for item in items]
    flexible = [
        last_number(text) is not None and last_number(text) == last_number(a)
        for text, a in zip(said, wanted, strict=True)
    ]
    exact = [gsm8k_exact(text, answer) == 1 for text, answer in zip(said, wanted, strict=True)]
    return {"exact": np.array(exact, dtype=bool), "flexible": np.array(flexible, dtype=bool)}


class Scripted:
    """A model without weights that answers the items of a set in their order."""

    def __init__(self, sure: Sequence[bool], said: Sequence[str] = ()) -> None:
        self.sure, self.said = iter(sure), list(said)

    def loglik(self, asked: Sequence[tuple[str, str]], *, label: str = "") -> list[LogLik]:
        """0 where it is sure, and as good as impossible elsewhere."""
        return [LogLik(0.0 if next(self.sure) else -1e6, 1, False) for _ in asked]

    def generate(self, prompts: Sequence[Any], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """What it was told to say."""
        return list(self.said)


def ignorant(asked: ChoiceSet) -> Scripted:
    """A model that says nothing and finds every answer equally likely."""
    return Scripted([True] * sum(len(getattr(item, "answers", ())) for item in asked.items), [""] * len(asked.items))


def knowing(asked: ChoiceSet, order: Sequence[int] | None = None) -> Scripted:
    """A model that knows the right answers; with `order` it gives item n the right answer of item order[n]."""
    items = list(asked.items)
    others = items if order is None else [items[n] for n in order]
    sure, said = [], []
    for item, other in zip(items, others, strict=True):
        said.append(other.answer if isinstance(other, Sum) else "")
        if isinstance(item, ChoiceItem) and isinstance(other, ChoiceItem):
            sure += [n == other.gold % len(item.answers) for n in range(len(item.answers))]
    return Scripted(sure, said)


def gate(asked: ChoiceSet) -> None:
    """Refuse a set that a model without knowledge can pass, or that one that knows every answer cannot."""
    for name, make, wanted in (("knows nothing", ignorant, 0.0), ("knows every answer", knowing, 1.0)):
        for metric, right in score(make(asked), asked, label="check").items():
            if right.mean() != wanted:
                where = next(item.id for item, ok in zip(asked.items, right, strict=True) if ok != wanted)
                raise PolybitError(
                    f"A model that {name} scores {right.mean():.1%} {metric} on {asked.name!r}, first at {where!r}: "
                    "its choices or its answer are damaged; remove such items."
                )


def chance(asked: ChoiceSet) -> float:
    """Score of drawing an answer at random."""
    return float(np.mean([0 if isinstance(item, Sum) else 1 / len(item.answers) for item in asked.items]))


def scored(
    reference: LocalLM, quantized: LocalLM, of_reference: bool, preset: str | None, asked: ChoiceSet, label: str
) -> Scores:
    """`score` of one of two models, the quantized one at a preset."""
    lm = reference if of_reference else quantized
    with lm.at(None if of_reference else preset):
        return score(lm, asked, label=label)


def scores_of(share: Share, presets: Sequence[str | None], asked: ChoiceSet) -> tuple[Scores, dict[str | None, Scores]]:
    """(scores of the reference, of the quantized model at each preset) on a set, part by part of its items."""
    parts = [replace(asked, items=items) for items in cut(asked.items)]
    who = [(True, None, "float"), *((False, preset, str(preset)) for preset in presets)]
    told = [(of_reference, preset, part, label) for of_reference, preset, label in who for part in parts]
    found = list(share(scored, told, asked.name))
    rows = [found[start : start + len(parts)] for start in range(0, len(found), len(parts))]
    base, *others = ({name: np.concatenate([part[name] for part in row]) for name in row[0]} for row in rows)
    return base, dict(zip(presets, others, strict=True))


def compare_choices(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    sets: Sequence[ChoiceSet],
    *,
    seed: int = 0,
    share: Share | None = None,
) -> dict[str, Any]:
    """{SET: {"n", "chance", "shots", "form", "reference": {METRIC: E}, "presets": {NAME: {METRIC: {...}}}}}.

    share: who reads (default: this process).
    A metric of a preset holds its rate, the paired `difference` to the reference, and answer-level flips: `flips`,
    `correct_to_wrong`, `wrong_to_correct` as shares of all items ("Accuracy is Not All You Need", arXiv 2407.09141).
    """
    found: dict[str, Any] = {}
    share = share or Here(reference, quantized)
    others = [preset for preset in presets if preset is not None or quantized is not reference]  # it was just read
    for asked in sets:
        gate(asked)
        base, by_preset = scores_of(share, others, asked)
        entry: dict[str, Any] = {
            "n": len(asked.items),
            "chance": chance(asked),
            "shots": asked.shots,
            "form": asked.form or "by set",
            "reference": {name: bootstrap(right, seed=seed).to_json() for name, right in base.items()},
            "presets": {},
        }
        for preset, scores in by_preset.items():
            entry["presets"][preset or "as loaded"] = {
                name: paired(base[name], right, seed=seed) for name, right in scores.items()
            }
        found[asked.name] = entry
    return found


def paired(was: NDArray[np.bool_], now: NDArray[np.bool_], *, seed: int) -> dict[str, Any]:
    """A rate, its paired difference, and the answers that changed sides."""
    values = {"flips": was != now, "correct_to_wrong": was & ~now, "wrong_to_correct": ~was & now}
    difference = bootstrap(now.astype(float), paired_with=was.astype(float), seed=seed)
    return {
        **bootstrap(now, seed=seed).to_json(),
        "difference": difference.to_json(),
        **{name: bootstrap(changed, seed=seed).to_json() for name, changed in values.items()},
    }
