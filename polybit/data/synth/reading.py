"""Reading comprehension in SQuAD's form: a passage of facts about invented persons, towns and ships, and questions.

Every relation has four statements and four questions. Statement i and question j of a relation never meet in training
when (i + j + checksum(relation)) is divisible by four; evaluation can ask for exactly these pairs. Most passages give
several entities the same relation, so that an answer cannot be found by its type alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from polybit.data.synth.names import checksum, draw_names
from polybit.data.synth.records import Document, Turn
from polybit.data.synth.relations import SCHEMAS, Relation


@dataclass(frozen=True)
class Fact:
    """One sentence of a passage and where its parts lie in the passage (offsets in characters)."""

    subject: str
    relation: str
    value: str
    statement: int
    subject_start: int
    value_start: int


def is_held_out_pair(relation: str, statement: int, question: int) -> bool:
    """Whether this statement and this question are kept apart in training."""
    return (statement + question + checksum(relation)) % 4 == 0


def passage(
    rng: Random, *, held_out: bool, facts: int, contrast: bool = False
) -> tuple[str, list[Fact], dict[str, Relation]]:
    """Draw a passage of at most `facts` sentences, its facts with offsets, and the schema they belong to.

    With `contrast` two or three subjects share every relation, so that no question can be answered by its type.
    """
    schema = SCHEMAS[rng.choice(sorted(SCHEMAS))]
    if contrast:
        subjects = draw_names(rng, rng.choice((2, 2, 3)), held_out=held_out)
        shared = rng.sample(sorted(schema), rng.choice((1, 1, 2)))
        chosen = [(subject, relation) for subject in subjects for relation in shared]
        if rng.random() < 0.5:
            rng.shuffle(chosen)
    else:
        subjects = draw_names(rng, rng.choice((1, 2, 2, 3)), held_out=held_out)
        chosen = _choose_slots(rng, subjects, sorted(schema), facts)
    taken = set(subjects)
    text, out = "", []
    for subject, relation in chosen:
        value = schema[relation].draw(rng, held_out)
        while value in taken:
            value = schema[relation].draw(rng, held_out)
        taken.add(value)
        statement = rng.randrange(4)
        template = schema[relation].statements[statement]
        text += " " if text else ""
        places = {part: len(text) + _place(template, part, subject, value) for part in "sv"}
        text += template.format(s=subject, v=value)
        out.append(Fact(subject, relation, value, statement, places["s"], places["v"]))
    return text, out, schema


def _place(template: str, part: str, subject: str, value: str) -> int:
    """Where in the finished sentence the subject or the value begins."""
    return len(template[: template.index("{" + part + "}")].format(s=subject, v=value))


def _choose_slots(rng: Random, subjects: list[str], relations: list[str], facts: int) -> list[tuple[str, str]]:
    """(subject, relation) pairs of a passage; in most passages the subjects share relations."""
    slots = [(subject, relation) for subject in subjects for relation in relations]
    rng.shuffle(slots)
    if len(subjects) > 1 and rng.random() < 0.6:
        shared = rng.sample(relations, min(len(relations), max(1, facts // len(subjects))))
        slots.sort(key=lambda slot: slot[1] not in shared)
        chosen = slots[:facts]
        rng.shuffle(chosen)
    else:
        chosen = slots[:facts]
    if rng.random() < 0.5:
        chosen.sort(key=lambda slot: subjects.index(slot[0]))
    return chosen


def questions(rng: Random, text: str, facts: list[Fact], schema: dict[str, Relation], *, new_pairs: bool) -> list[Turn]:
    """Questions on a passage in random order; with `new_pairs` only those whose wording training keeps apart."""
    found: list[tuple[str, str, str, int]] = []
    for fact in facts:
        relation = schema[fact.relation]
        wordings = [j for j in range(4) if is_held_out_pair(fact.relation, fact.statement, j) == new_pairs]
        for wording in rng.sample(wordings, min(len(wordings), 2)):
            found.append(
                (relation.questions[wording].format(s=fact.subject), fact.value, fact.relation, fact.value_start)
            )
        if relation.reverse and not new_pairs:
            asked = rng.choice(relation.reverse).format(v=fact.value)
            found.append((asked, fact.subject, fact.relation + " reversed", fact.subject_start))
    rng.shuffle(found)
    return [
        Turn(
            question,
            answer,
            {
                "passage": text,
                "question": question,
                "answers": {"text": [answer], "answer_start": [start]},
                "relation": relation,
                "new_pair": new_pairs,
            },
        )
        for question, answer, relation, start in found
    ]


def document(
    rng: Random, *, held_out: bool, easy: bool = False, new_pairs: bool = False, turns: int | None = None
) -> Document:
    """A passage with its first question, further questions on it as further turns."""
    count = rng.choice((1, 2, 3)) if easy else rng.choice((2, 3, 4, 5, 6, 7))
    text, facts, schema = passage(rng, held_out=held_out, facts=count)
    return _conversation(
        text, questions(rng, text, facts, schema, new_pairs=new_pairs), turns or rng.choice((4, 6, 8, 10))
    )


def contrast(rng: Random, *, held_out: bool, easy: bool = False) -> Document:
    """A passage whose subjects share every relation; drill for finding the right subject."""
    text, facts, schema = passage(rng, held_out=held_out, facts=0, contrast=True)
    return _conversation(text, questions(rng, text, facts, schema, new_pairs=False), 8)


def _conversation(text: str, asked: list[Turn], turns: int) -> Document:
    first = asked[0]
    opening = Turn(f"{text}\n{first.user}", first.assistant, first.truth)
    return Document("reading", (opening, *asked[1:turns]))
