"""The attacks by name, and all that anybody else needs to know of each; a new one is a file here and a line below.

Every attack is made at each width and at all widths at once, through the mean over them (expectation over the draw,
EOT: Athalye et al., ICML 2018). That is the victim's doing (robust/gradients.py): no attack needs to know of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from polybit.core.parts import load
from polybit.core.runtime import PolybitError

Changes = Literal["tokens", "words", "embeddings"]
PLACES = {  # where an attack on tokens may put them
    "suffix": "new tokens between the text and the question",
    "swap": "tokens of the text that are not the answer",
}


@dataclass(frozen=True, kw_only=True)
class AttackBudget:
    """What an attacker may spend.

    steps: of the search · tries: changes measured per step; attacks on words measure `steps * tries` at once · top:
    tokens the gradient proposes per position · changes: at most so many free positions of a case differ from its start,
    or words are edited (0 = any number) · epsilon: how far an embedding may move, as a share of their mean length.
    """

    steps: int = 8
    tries: int = 12
    top: int = 64
    changes: int = 0
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        for name, value, least in (("steps", self.steps, 1), ("tries", self.tries, 1), ("top", self.top, 1)):
            if value < least:
                raise PolybitError(f"{name} of an attack is {value}: give {least} or more")
        if not 0 < self.epsilon < 10:
            raise PolybitError(f"epsilon of an attack is {self.epsilon}: give a number above 0 and below 10")


@dataclass(frozen=True, slots=True)
class Attack:
    """One way to make a model answer wrongly.

    function: dotted path · summary: half a sentence for `--help` · changes: what it may touch, which says how it is
    called · gradient: whether it reads the model's gradient, or only measures losses.

    tokens: `(victim, cases, budget, allowed, *, seed) -> cases` with `allowed` tokens at free positions, never worse
    for the attacker than they were · words: `(word, rng) -> word`, one edit of one word; the worst of many is taken ·
    embeddings: `(model, loss, free_BT, *, radius, iterations, seed) -> delta_BTD`, at most `radius` long per token.
    """

    function: str
    summary: str
    changes: Changes
    gradient: bool = True

    def __call__(self, *given: Any, **named: Any) -> Any:
        """What the attack finds."""
        return load(self.function)(*given, **named)


ATTACKS: dict[str, Attack] = {
    "greedy": Attack("polybit.robust.swaps:greedy", "gradient, then measured (GCG)", "tokens"),
    "hotflip": Attack("polybit.robust.swaps:hotflip", "gradient alone", "tokens"),
    "random": Attack("polybit.robust.swaps:random", "search without a gradient", "tokens", gradient=False),
    "characters": Attack("polybit.robust.edits:edit_characters", "typing errors", "words", gradient=False),
    "words": Attack("polybit.robust.edits:edit_word", "changed words", "words", gradient=False),
    "pgd": Attack("polybit.robust.embeddings:ascend", "embeddings moved along their gradient", "embeddings"),
}
