"""Answers of a given form: which tokens may come next under a JSON schema, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError

MOST_BYTES = 64_000  # of a schema
MOST_DEPTH = 64
COMPACT = {"whitespace_flexible": False}  # a small model would fill its answer with blanks where it may
ANY_OBJECT = {"type": "object"}


class Grammars:
    """Makes constraints for one tokenizer; the table of its tokens is built at the first."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int] = frozenset()) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, ends
        self.table: Any = None
        self.lock = threading.Lock()

    def json_schema(self, schema: Any, where: str) -> Grammar:
        """The constraint of a JSON schema; refused, naming the field `where`, when it cannot be met or is too large."""
        check_size(schema, where)
        llguidance = self.library(where)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=COMPACT)
            faults = llguidance.LLMatcher.validate_grammar(grammar, self.tokens(llguidance))
        except Exception as error:  # the library's own kinds of error are not public
            raise PolybitError(f"{where} is no JSON schema that can be kept to: {error!s:.200}") from None
        if faults:
            raise PolybitError(f"{where} is no JSON schema that can be kept to: {faults!s:.200}")
        return self.made(llguidance, grammar, where)

    def calls_within(self, marks: tuple[str, str], schema: Any, where: str) -> Grammar:
        """Any text, but what stands between these marks keeps to the schema."""
        check_size(schema, where)
        llguidance = self.library(where)
        call = "start: BLANKS call BLANKS\nBLANKS: /[ \\n]{0,2}/\ncall: %json " + json.dumps(schema)
        tag = llguidance.StructTag(trigger=marks[0], begin=marks[0], grammar=call, end=marks[1])
        special = marks[0] in self.tokenizer.all_special_tokens
        grammar = llguidance.StructTag.to_grammar([tag], assume_special=special)
        return self.made(llguidance, grammar, where)

    def made(self, llguidance: Any, grammar: str, where: str) -> Grammar:
        """A matcher at its beginning."""
        matcher = llguidance.LLMatcher(self.tokens(llguidance), grammar)
        if matcher.is_error():
            raise PolybitError(f"{where} cannot be kept to: {matcher.get_error()!s:.200}")
        return Grammar(matcher, self.vocabulary, where)

    def library(self, where: str) -> Any:
        """llguidance, or the sentence that says how to get it."""
        try:
            import llguidance
        except ImportError:
            raise PolybitError(f"{where} needs llguidance: pip install 'polybit[serve]'") from None
        return llguidance

    def tokens(self, llguidance: Any) -> Any:
        """The tokenizer as llguidance knows it."""
        with self.lock:
            return self.made_table(llguidance)

    def made_table(self, llguidance: Any) -> Any:
        """The same, made at the first."""
        if self.table is None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise PolybitError("this model's tokenizer is a slow one: answers of a given form need a fast one")
            text = json.loads(backend.to_str())
            text["truncation"] = text["padding"] = None
            self.table = llguidance.LLTokenizer(
                json.dumps(text), n_vocab=self.vocabulary, eos_token=sorted(self.ends) or self.tokenizer.eos_token_id
            )
        return self.table


class Grammar:
    """A constraint on the way (request.Constraint)."""

    def __init__(self, matcher: Any, vocabulary: int, where: str) -> None:
        self.matcher, self.vocabulary, self.where = matcher, vocabulary, where

    def copy(self) -> Grammar:
        """The same place in the same grammar, for another answer."""
        return Grammar(self.matcher.deep_copy(), self.vocabulary, self.where)

    def mask(self) -> Tensor:
        """True where a token is allowed, bool [V]."""
        words = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.int32)
        if self.matcher.is_error():
            raise PolybitError(f"{self.where} cannot be kept to: {self.matcher.get_error()!s:.200}")
        bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        mask_V = bits.flatten()[: self.vocabulary].bool()
        if not bool(mask_V.any()):
            raise PolybitError(f"{self.where} allows no token here: no answer can meet it")
        return mask_V

    def take(self, token: int) -> bool:
        """Note a token; True when nothing may follow."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())


def check_size(schema: Any, where: str) -> None:
    """Refuse what is no schema, and one that is large or deep enough to keep a server busy."""
    if not isinstance(schema, (Mapping, bool)):
        raise PolybitError(f"{where} is {type(schema).__name__}: give a JSON schema, an object")
    deepest, level = 0, [schema]
    while level and deepest <= MOST_DEPTH:
        deepest += 1
        below: list[Any] = []
        for value in level:
            inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            below += [item for item in inner if isinstance(item, (Mapping, list))]
        level = below
    if deepest > MOST_DEPTH:
        raise PolybitError(f"{where} is nested more than {MOST_DEPTH} levels deep: give a flatter schema")
    size = len(json.dumps(schema))
    if size > MOST_BYTES:
        raise PolybitError(f"{where} has {size} bytes: give at most {MOST_BYTES}")
