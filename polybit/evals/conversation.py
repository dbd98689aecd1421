"""Let a model talk: answers turn by turn, each turn seeing the user's messages and the model's own earlier answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polybit.data.chat import Prompt, encode_prompt
from polybit.data.turns import Messages
from polybit.hub.lm import LocalLM


@dataclass(frozen=True, slots=True)
class Talk:
    """Answers of one model to several scripts of user messages.

    texts: per script, an answer per turn · prompts, tokens: the token ids of every turn · dropped: per script and turn,
    how many of the oldest exchanges had to be left out to fit the model's context.
    """

    texts: list[list[str]]
    prompts: list[list[list[int]]]
    tokens: list[list[list[int]]]
    dropped: list[list[int]]


def history(script: Sequence[str], answers: Sequence[str]) -> Messages:
    """Messages up to the user's turn that follows the given answers."""
    messages: Messages = []
    for said, answer in zip(script, answers, strict=False):
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": script[len(answers)]}]


def fit(lm: LocalLM, messages: Messages, max_tokens: int) -> tuple[list[int], int]:
    """Token ids of a conversation that leave room for an answer: (ids, dropped exchanges), the oldest go first."""
    room = None if lm.max_length is None else lm.max_length - max_tokens
    dropped = 0
    while True:
        prompt: Prompt = messages[2 * dropped :]
        ids = encode_prompt(lm.tokenizer, prompt)
        if room is None or len(ids) <= room or 2 * dropped + 1 >= len(messages):
            return (ids if room is None else ids[-room:]), dropped
        dropped += 1


def converse(
    lm: LocalLM,
    scripts: Sequence[Sequence[str]],
    *,
    max_tokens: int,
    given: Sequence[Sequence[str]] | None = None,
    label: str = "talk",
) -> Talk:
    """Greedy answers to every turn of every script.

    given: answers that stand in the history instead of the model's own (those of another model), script by script.
    """
    talk = Talk([[] for _ in scripts], [[] for _ in scripts], [[] for _ in scripts], [[] for _ in scripts])
    for turn in range(max(map(len, scripts), default=0)):
        live = [n for n, script in enumerate(scripts) if turn < len(script)]
        before = talk.texts if given is None else given
        fitted = [fit(lm, history(scripts[n], before[n][:turn]), max_tokens) for n in live]
        answers = lm.generate_tokens(
            [ids for ids, _ in fitted], max_tokens=max_tokens, label=f"{label}, turn {turn + 1}"
        )
        for n, (ids, dropped), answer in zip(live, fitted, answers, strict=True):
            talk.texts[n].append(lm.decode(answer, after=ids).strip())
            talk.prompts[n].append(ids)
            talk.tokens[n].append(answer)
            talk.dropped[n].append(dropped)
    return talk
