"""Arithmetic word problems with the working written out and a last line `#### n`, in GSM8K's form, and equation drills.

A template is a question, a rationale whose equations are written without spaces, and a draw of its numbers. The pair
(template, object) is held out of training when (template + object) is divisible by eight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from polybit.data.synth.names import OBJECTS, draw_names
from polybit.data.synth.records import Document, Turn

Numbers = dict[str, int]


@dataclass(frozen=True)
class Template:
    """{A} {B} {C} people, {p}/{P} pronoun, {it} objects, small letters numbers; `result` names the final number."""

    question: str
    rationale: str
    draw: Callable[[Random, int], Numbers]
    result: str


def _up_to(rng: Random, low: int, high: int, limit: int) -> int:
    return rng.randint(low, max(low, min(high, limit)))


def _sum(rng: Random, limit: int) -> Numbers:
    a, b = _up_to(rng, 2, 50, limit), _up_to(rng, 2, 40, limit)
    return {"a": a, "b": b, "x": a + b}


def _difference(rng: Random, limit: int) -> Numbers:
    x, b = _up_to(rng, 1, 50, limit), _up_to(rng, 2, 40, limit)
    return {"a": x + b, "b": b, "x": x}


def _product(rng: Random, limit: int) -> Numbers:
    m, n = rng.randint(2, 9), rng.randint(2, 9)
    return {"m": m, "n": n, "x": m * n}


def _sum_then_less(rng: Random, limit: int) -> Numbers:
    numbers = _sum(rng, limit)
    c = rng.randint(1, max(1, min(30, numbers["x"] - 1)))
    return numbers | {"c": c, "y": numbers["x"] - c}


def _sum_then_more(rng: Random, limit: int) -> Numbers:
    numbers = _sum(rng, limit)
    c = _up_to(rng, 2, 25, limit)
    return numbers | {"c": c, "y": numbers["x"] + c}


def _product_then_more(rng: Random, limit: int) -> Numbers:
    numbers = _product(rng, limit)
    c = _up_to(rng, 2, 30, limit)
    return numbers | {"c": c, "y": numbers["x"] + c}


def _product_then_less(rng: Random, limit: int) -> Numbers:
    numbers = _product(rng, limit)
    c = rng.randint(1, min(40, numbers["x"] - 1))
    return numbers | {"c": c, "y": numbers["x"] - c}


def _change(rng: Random, limit: int) -> Numbers:
    numbers = _product(rng, limit)
    c = rng.randint(1, 20)
    return numbers | {"paid": numbers["x"] + c, "c": c}


def _more_than(rng: Random, limit: int) -> Numbers:
    a, b = _up_to(rng, 2, 40, limit), _up_to(rng, 2, 30, limit)
    return {"a": a, "b": b, "x": a + b, "y": a + a + b}


def _twice(rng: Random, limit: int) -> Numbers:
    a = _up_to(rng, 1, 35, limit)
    return {"a": a, "x": 2 * a, "y": 3 * a}


def _more_less(rng: Random, limit: int) -> Numbers:
    numbers = _product_then_more(rng, limit)
    d = rng.randint(1, min(40, numbers["y"] - 1))
    return numbers | {"d": d, "z": numbers["y"] - d}


def _two_products(rng: Random, limit: int) -> Numbers:
    m, n, k, j = (rng.randint(2, 9) for _ in range(4))
    return {"m": m, "n": n, "k": k, "j": j, "x": m * n, "y": k * j, "z": m * n + k * j}


def _three_people(rng: Random, limit: int) -> Numbers:
    a, b, c = _up_to(rng, 2, 30, limit), _up_to(rng, 2, 20, limit), _up_to(rng, 2, 20, limit)
    return {"a": a, "b": b, "c": c, "x": a + b, "y": a + b + c, "z": 2 * a + 2 * b + c}


def _share_sum(rng: Random, limit: int) -> Numbers:
    m, n = rng.randint(2, 9), rng.randint(2, 9)
    a = rng.randint(1, m * n - 1)
    return {"a": a, "b": m * n - a, "x": m * n, "m": m, "n": n}


TEMPLATES = (
    Template(
        "{A} has {a} {it}. {P} buys {b} more. How many {it} does {A} have now?",
        "{A} has {a}+{b}={x} {it}.",
        _sum,
        "x",
    ),
    Template(
        "{A} has {a} {it}. {P} gives {b} to {B}. How many {it} does {A} have left?",
        "{A} has {a}-{b}={x} {it} left.",
        _difference,
        "x",
    ),
    Template(
        "{A} has {a} {it} and {B} has {b} {it}. How many {it} do they have together?",
        "Together they have {a}+{b}={x} {it}.",
        _sum,
        "x",
    ),
    Template(
        "{A} has {m} bags. Each bag holds {n} {it}. How many {it} does {A} have?",
        "{A} has {m}*{n}={x} {it}.",
        _product,
        "x",
    ),
    Template(
        "{A} has {a} {it}. {P} finds {b} more and loses {c}. How many {it} does {A} have now?",
        "First {A} has {a}+{b}={x} {it}. Then {p} has {x}-{c}={y} {it}.",
        _sum_then_less,
        "y",
    ),
    Template(
        "{A} has {m} boxes with {n} {it} each. {B} gives {A} {c} more. How many {it} does {A} have?",
        "The boxes hold {m}*{n}={x} {it}. With {c} more {A} has {x}+{c}={y} {it}.",
        _product_then_more,
        "y",
    ),
    Template(
        "{A} buys {m} boxes of {n} {it}. {P} gives {c} {it} to {B}. How many {it} are left?",
        "{A} buys {m}*{n}={x} {it}. After that {x}-{c}={y} {it} are left.",
        _product_then_less,
        "y",
    ),
    Template(
        "{B} has {a} {it}. {A} has {b} more than {B}. How many {it} does {A} have?",
        "{A} has {a}+{b}={x} {it}.",
        _sum,
        "x",
    ),
    Template(
        "{B} has {a} {it}. {A} has {b} more than {B}. How many {it} do they have in all?",
        "{A} has {a}+{b}={x} {it}. In all they have {a}+{x}={y} {it}.",
        _more_than,
        "y",
    ),
    Template(
        "{A} shares {x} {it} among {m} friends. How many {it} does each friend get?",
        "Each friend gets {x}/{m}={n} {it}.",
        _product,
        "n",
    ),
    Template(
        "One of the {it} costs {n} dollars. How many dollars do {m} {it} cost?",
        "They cost {m}*{n}={x} dollars.",
        _product,
        "x",
    ),
    Template(
        "{A} buys {m} {it} for {n} dollars each. {P} pays with {paid} dollars. How many dollars does {A} get back?",
        "The {it} cost {m}*{n}={x} dollars. {A} gets {paid}-{x}={c} dollars back.",
        _change,
        "c",
    ),
    Template(
        "{A} sells {a} {it} on Monday, {b} on Tuesday and {c} on Friday. How many {it} does {A} sell?",
        "On Monday and Tuesday {A} sells {a}+{b}={x} {it}. With Friday it is {x}+{c}={y} {it}.",
        _sum_then_more,
        "y",
    ),
    Template(
        "{B} has {a} {it}. {A} has twice as many. How many {it} do they have together?",
        "{A} has 2*{a}={x} {it}. Together they have {a}+{x}={y} {it}.",
        _twice,
        "y",
    ),
    Template(
        "{A} has {m} boxes with {n} {it} each. {P} finds {c} more and gives {d} to {B}. How many {it} are left?",
        "The boxes hold {m}*{n}={x} {it}. Then {p} has {x}+{c}={y} {it}. After that {y}-{d}={z} {it} are left.",
        _more_less,
        "z",
    ),
    Template(
        "{A} has {m} bags with {n} {it} each. {B} has {k} bags with {j} {it} each. How many {it} do they have in all?",
        "{A} has {m}*{n}={x} {it}. {B} has {k}*{j}={y} {it}. In all they have {x}+{y}={z} {it}.",
        _two_products,
        "z",
    ),
    Template(
        "{A} has {a} {it}. {B} has {b} more than {A}. {C} has {c} more than {B}. "
        "How many {it} do {B} and {C} have together?",
        "{B} has {a}+{b}={x} {it}. {C} has {x}+{c}={y} {it}. Together they have {x}+{y}={z} {it}.",
        _three_people,
        "z",
    ),
    Template(
        "{A} has {a} {it} and {B} has {b} {it}. They share them among {m} friends. How many {it} does each friend get?",
        "Together they have {a}+{b}={x} {it}. Each friend gets {x}/{m}={n} {it}.",
        _share_sum,
        "n",
    ),
)
LIMIT, EASY_LIMIT = 99, 12


def is_held_out_pair(template: int, thing: str) -> bool:
    """Whether this template and this object are kept apart in training."""
    return (template + OBJECTS.index(thing)) % 8 == 0


def problem(rng: Random, *, held_out: bool, new_pairs: bool = False, limit: int = LIMIT) -> Turn:
    """One word problem; `limit` bounds the operands that are drawn."""
    index, thing = rng.randrange(len(TEMPLATES)), rng.choice(OBJECTS)
    while is_held_out_pair(index, thing) != new_pairs:
        index, thing = rng.randrange(len(TEMPLATES)), rng.choice(OBJECTS)
    template = TEMPLATES[index]
    people = dict(zip("ABC", draw_names(rng, 3, held_out=held_out), strict=True))
    pronoun = rng.choice(("he", "she"))
    numbers = template.draw(rng, limit)
    words = people | numbers | {"it": thing, "p": pronoun, "P": pronoun.capitalize()}
    number = numbers[template.result]
    rationale = template.rationale.format(**words)
    truth = {"rationale": rationale, "number": number, "template": index, "object": thing, "new_pair": new_pairs}
    return Turn(template.question.format(**words), f"{rationale} #### {number}", truth)


def document(
    rng: Random, *, held_out: bool, easy: bool = False, new_pairs: bool = False, turns: int | None = None
) -> Document:
    """One to three word problems in one conversation."""
    count = turns or (1 if easy else rng.choice((1, 1, 2, 3)))
    limit = EASY_LIMIT if easy else LIMIT
    asked = (problem(rng, held_out=held_out, new_pairs=new_pairs, limit=limit) for _ in range(count))
    return Document("arithmetic", tuple(asked))


def equation(rng: Random, *, easy: bool = False) -> tuple[str, int]:
    """Left side and value of one equation of the kinds that the word problems use."""
    limit = EASY_LIMIT if easy else LIMIT
    kind = rng.choice("+++---*/d")
    m, n = rng.randint(2, 9), rng.randint(2, 9)
    if kind == "+":
        a, b = _up_to(rng, 1, 81, limit), _up_to(rng, 1, 60, limit)
        return f"{a}+{b}", a + b
    if kind == "-":
        x, b = _up_to(rng, 1, 80, limit), _up_to(rng, 1, 40, limit)
        return f"{x + b}-{b}", x
    if kind == "*":
        return f"{m}*{n}", m * n
    if kind == "/":
        return f"{m * n}/{m}", n
    a = _up_to(rng, 1, 35, limit)
    return f"2*{a}", 2 * a


def drill(rng: Random, *, held_out: bool = False, easy: bool = False) -> Document:
    """A conversation of one turn with two to eight equations to work out."""
    equations = [equation(rng, easy=easy) for _ in range(rng.choice((2, 4, 6, 8)))]
    asked = "Compute " + ", ".join(left for left, _ in equations) + "."
    worked = ", ".join(f"{left}={value}" for left, value in equations) + "."
    return Document("drill", (Turn(asked, worked, {"values": [value for _, value in equations]}),))
