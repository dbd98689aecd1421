"""Who attacks: nobody, random tokens, an attacker at each precision, and one who looks at all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polybit.core.runtime import write_json
from polybit.data.squad import Answer, Asked
from polybit.hub.lm import LocalLM
from polybit.hub.workspace import Workspace
from polybit.robust.cases import Case, Place, allowed_tokens, build_cases
from polybit.robust.edits import worst_edits
from polybit.robust.gradients import Victim
from polybit.robust.table import ATTACKS, AttackBudget

NOBODY = "nobody"
NOISE = "random tokens"  # what attackers with a suffix start from
ADAPTIVE = "all widths"  # the attacker who averages over the precisions the defender draws from (EOT)


def views(presets: Sequence[str]) -> dict[str, list[str]]:
    """Attacker -> the precisions it looks at."""
    return {preset: [preset] for preset in presets} | {ADAPTIVE: list(presets)}


@dataclass(frozen=True, slots=True)
class Quiz:
    """Questions to attack, and their right answers, which an attacker knows; room: most tokens of a prompt."""

    tokenizer: Any
    asked: Sequence[Asked]
    answers: Mapping[str, Sequence[Answer]]
    room: int | None = None

    def untouched(self, asked: Sequence[Asked] | None = None) -> list[Case]:
        """The questions (or edited ones in their place) as cases of which any word of the text may change."""
        given = self.asked if asked is None else asked
        return build_cases(self.tokenizer, given, self.answers, place="swap", room=self.room)


def attacked_prompts(
    lm: LocalLM,
    quiz: Quiz,
    presets: Sequence[str],
    name: str,
    budget: AttackBudget,
    *,
    place: Place = "suffix",
    seed: int = 0,
    store: Workspace | None = None,
) -> dict[str, list[Case]]:
    """Attacker -> prompts, by the attack on tokens or words of that name; finished attackers are kept in `store`.

    place: where tokens are changed · budget.changes: how many tokens or words.
    """
    found = {NOBODY: quiz.untouched()}
    if ATTACKS[name].changes == "words":
        for attacker, presets_seen in views(presets).items():
            found[attacker] = edited_prompts(Victim(lm, presets_seen), quiz, name, budget, seed)
        return found
    cases = build_cases(
        lm.tokenizer, quiz.asked, quiz.answers, place=place, count=budget.changes, room=quiz.room, seed=seed
    )
    if place == "suffix":
        found[NOISE] = cases
        budget = replace(budget, changes=0)  # all tokens of the suffix are the attacker's
    allowed = allowed_tokens(lm.tokenizer)
    for attacker, presets_seen in views(presets).items():

        def make(presets_seen: Sequence[str] = presets_seen) -> list[Case]:
            found: list[Case] = ATTACKS[name](Victim(lm, presets_seen), cases, budget, allowed, seed=seed)
            return found

        found[attacker] = remembered(store, f"{seed} {attacker}", make, cases)
    return found


def edited_prompts(victim: Victim, quiz: Quiz, name: str, budget: AttackBudget, seed: int) -> list[Case]:
    """The worst of several random edits of each question, by the loss the attacker sees."""
    worst = worst_edits(
        lambda versions: victim.losses(quiz.untouched(versions)).tolist(),
        quiz.asked,
        quiz.answers,
        name,
        count=budget.changes,
        tries=budget.steps * budget.tries,
        seed=seed,
    )
    return quiz.untouched(worst)


def remembered(store: Workspace | None, name: str, make: Callable[[], list[Case]], like: Sequence[Case]) -> list[Case]:
    """Cases an earlier, interrupted run found, else those `make` finds, which are then kept; `like` gives the rest."""
    if store is None:
        return make()
    path = store.file(name).with_suffix(".json")
    if path.is_file():
        rows = json.loads(path.read_text())
        return [replace(case, ids=tuple(ids)) for case, ids in zip(like, rows, strict=True)]
    found = make()
    write_json(path, [list(case.ids) for case in found])
    return found
