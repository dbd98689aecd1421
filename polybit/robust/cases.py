"""What an attacker may change: a few tokens put after the text, or tokens of the text that are not the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt, encode_conversation, encode_prompt
from polybit.data.spans import filler, too_long
from polybit.data.squad import Answer, Asked
from polybit.data.stream import encode
from polybit.data.text import has_chat_template

Place = Literal["suffix", "swap"]  # PLACES in robust/table.py says what they are


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt as tokens, the positions an attacker may change, and the tokens of the right answer with its EOS.

    `free` positions never hold a word of the question or of an answer, so what is right stays right.
    """

    id: str
    ids: tuple[int, ...]
    free: tuple[int, ...]
    answer: tuple[int, ...]

    def with_tokens(self, tokens: Sequence[int]) -> Case:
        """The case with other tokens at the free positions."""
        ids = list(self.ids)
        for position, token in zip(self.free, tokens, strict=True):
            ids[position] = int(token)
        return replace(self, ids=tuple(ids))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens at the free positions."""
        return tuple(self.ids[position] for position in self.free)


def build_cases(
    tokenizer: Any,
    asked: Sequence[Asked],
    answers: Mapping[str, Sequence[Answer]],
    *,
    place: Place = "suffix",
    count: int = 6,
    room: int | None = None,
    seed: int = 0,
) -> list[Case]:
    """One case per question that has an answer.

    place "suffix": `count` tokens, drawn at random, between the text and the question · "swap": any token of the text
    may change, except those of the question's and the answers' words; an attack changes at most `count` of them.
    Raises PolybitError for a prompt longer than `room` tokens, which is never cut.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.tensor(allowed_tokens(tokenizer))
    found = []
    for one in asked:
        if not answers.get(one.id):
            continue
        prompt = filler(tokenizer)(one.context, one.question)
        ids, spans = prompt_tokens(tokenizer, prompt)
        begin = begin_of(tokenizer, prompt, one.context)
        stop = begin + len(one.context)
        answer = answer_tokens(tokenizer, prompt, ids, answers[one.id][0].text)
        if place == "suffix":
            after = sum(1 for span in spans if span[0] < stop)
            drawn = vocabulary[torch.randint(len(vocabulary), (count,), generator=generator)].tolist()
            ids, free = [*ids[:after], *drawn, *ids[after:]], list(range(after, after + count))
        else:
            kept = protected(one, answers[one.id])
            free = [
                n
                for n, (a, b) in enumerate(spans)
                if begin <= a < b <= stop and not any(a < high + begin and b > low + begin for low, high in kept)
            ]
        if room is not None and len(ids) + len(answer) > room:
            raise too_long(one, len(ids) + len(answer), room)
        found.append(Case(one.id, tuple(ids), tuple(free), tuple(answer)))
    if not found:
        raise PolybitError("there is nothing to attack: none of the questions has an answer")
    return found


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The text whose tokens `encode_prompt` gives."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a prompt, and where each lies in its text; (0, 0) for a token put before it."""
    ids = encode_prompt(tokenizer, prompt)
    encoded = tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False, return_offsets_mapping=True)
    spans = [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    extra = len(ids) - len(spans)
    if extra < 0 or ids[extra:] != list(encoded["input_ids"]):
        raise PolybitError("this tokenizer does not tell where its tokens lie in a text: use a fast tokenizer")
    return ids, [(0, 0)] * extra + spans


def begin_of(tokenizer: Any, prompt: Prompt, context: str) -> int:
    """Where the context begins in the prompt's text, whose template may strip blanks from its ends."""
    begin = prompt_text(tokenizer, prompt).find(context.strip())
    if begin < 0:
        raise PolybitError("the chat template rewrites the text of the prompt, so its tokens cannot be told apart")
    return begin - (len(context) - len(context.lstrip()))


def answer_tokens(tokenizer: Any, prompt: Prompt, ids: Sequence[int], answer: str) -> list[int]:
    """Tokens the model would say for an answer, its EOS included."""
    if not isinstance(prompt, str) and has_chat_template(tokenizer):
        whole, ours = encode_conversation(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
        return [token for token, mine in zip(whole, ours, strict=True) if mine]
    before = prompt_text(tokenizer, prompt)
    tokens = encode(tokenizer, f"{before} {answer}").tolist()[len(encode(tokenizer, before)) :]
    return tokens + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def protected(one: Asked, answers: Iterable[Answer]) -> list[tuple[int, int]]:
    """Spans of the context that hold a word of the question or of an answer."""
    words = {word.lower() for text in (one.question, *(a.text for a in answers)) for word in re.findall(r"\w+", text)}
    return [match.span() for match in re.finditer(r"\w+", one.context) if match.group().lower() in words]


def allowed_tokens(tokenizer: Any) -> list[int]:
    """Tokens an attacker may use: those that are not special and decode to some text of whole characters."""
    special = set(tokenizer.all_special_ids)
    texts = ((token, tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in special)
    return [token for token, text in texts if text.strip() and "\ufffd" not in text and "\n" not in text]
