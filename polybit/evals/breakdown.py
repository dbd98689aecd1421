"""What hurts more: the flipped token itself, or that the quantized model writes on after it.

Four answers to each prompt whose greedy answers part at token t* (QDPO's breakdown of its token-flipping claim):
(i) the float model all the way; (ii) the float model, but made to say the quantized model's token at t*; (iii) the
float model up to and with its own token at t*, then the quantized model; (iv) the quantized model all the way. In (iii)
the float model's token at t* counts as its own: handing over before it would give the text of (iv) again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from polybit.evals.fidelity import mean_logprob, rouge_l
from polybit.evals.readings import PairedAnswers
from polybit.evals.scoring import bootstrap
from polybit.hub.lm import LocalLM

ARMS = {
    "float": "(i) the float model all the way",
    "forced_flip": "(ii) the float model with the flipped token forced in",
    "continuation": "(iii) the float model's token, then the quantized model",
    "quantized": "(iv) the quantized model all the way",
}


def branch(
    lm: LocalLM, prompts: Sequence[Sequence[int]], starts: Sequence[Sequence[int]], max_tokens: int, *, label: str
) -> list[list[int]]:
    """Greedy answers that begin with given tokens; a start that already ended or fills the answer stays as it is."""
    answers = [list(start) for start in starts]
    ends = lm.end_tokens()
    by_room: dict[int, list[int]] = defaultdict(list)
    for number, start in enumerate(starts):
        if start[-1] not in ends and len(start) < max_tokens:
            by_room[max_tokens - len(start)].append(number)
    for room, members in sorted(by_room.items()):  # one length at a time, so that no prompt loses a token to make room
        rows = [[*prompts[n], *starts[n]] for n in members]
        for n, more in zip(members, lm.generate_tokens(rows, max_tokens=room, label=label), strict=True):
            answers[n] += more
    return answers


def flip_breakdown(
    reference: LocalLM,
    quantized: LocalLM,
    preset: str | None,
    answers: PairedAnswers,
    max_tokens: int,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Damage of each arm after t*, measured on the tail (from t* on) against the float model's own tail.

    {"n", "arms": {ARM: {"tail_rouge_l": E, "tail_nats": E, "damage": E}}, "forced_minus_continuation": E}.
    tail_nats: mean log-probability per token under the float model; damage: 1 - tail_rouge_l;
    forced_minus_continuation: damage of (ii) minus that of (iii), paired. None when no answer parts.
    """
    prompts, theirs, ours, stars = answers.prompts, answers.reference, answers.quantized, answers.stars
    parted = [
        (n, star) for n, star in enumerate(stars) if star is not None and star < min(len(theirs[n]), len(ours[n]))
    ]
    if not parted:
        return None
    kept = [list(prompts[n]) for n, _ in parted]
    forced = branch(
        reference, kept, [[*theirs[n][:star], ours[n][star]] for n, star in parted], max_tokens, label="forced flips"
    )
    with quantized.at(preset):
        continued = branch(
            quantized, kept, [list(theirs[n][: star + 1]) for n, star in parted], max_tokens, label="continuations"
        )
    arms = {
        "float": [list(theirs[n]) for n, _ in parted],
        "forced_flip": forced,
        "continuation": continued,
        "quantized": [list(ours[n]) for n, _ in parted],
    }
    found: dict[str, Any] = {"n": len(parted), "arms": {}}
    damages = {}
    for name, said in arms.items():
        tails = [answer[star:] for answer, (_, star) in zip(said, parted, strict=True)]
        wanted = [theirs[n][star:] for n, star in parted]
        overlap = np.array([rouge_l(a, b) for a, b in zip(wanted, tails, strict=True)])
        befores = [[*prompt, *answer[:star]] for prompt, answer, (_, star) in zip(kept, said, parted, strict=True)]
        nats = np.array(mean_logprob(reference, befores, tails, label=f"tails, {name}"))
        damages[name] = 1 - overlap
        found["arms"][name] = {
            "tail_rouge_l": bootstrap(overlap, seed=seed).to_json(),
            "tail_nats": bootstrap(nats, seed=seed).to_json(),
            "damage": bootstrap(damages[name], seed=seed).to_json(),
        }
    found["forced_minus_continuation"] = bootstrap(
        damages["forced_flip"], paired_with=damages["continuation"], seed=seed
    ).to_json()
    return found
