"""What a passage may say of a person, a town or a ship: each relation with four statements and four questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from polybit.data.synth.names import ANIMALS, COLORS, FOODS, GOODS, INSTRUMENTS, JOBS, MONTHS, draw_name

Draw = Callable[[Random, bool], str]


@dataclass(frozen=True)
class Relation:
    """How a fact is stated ({s} subject, {v} value), asked for, and asked the other way round."""

    draw: Draw
    statements: tuple[str, str, str, str]
    questions: tuple[str, str, str, str]
    reverse: tuple[str, ...] = ()


def _name(rng: Random, held_out: bool) -> str:
    return draw_name(rng, held_out=held_out)


def _year(rng: Random, held_out: bool) -> str:
    return str(rng.randint(1700, 2029))


def _one_of(words: list[str]) -> Draw:
    return lambda rng, held_out: rng.choice(words)


PERSON = {
    "home": Relation(
        _name,
        ("{s} lives in {v}.", "The home of {s} is in {v}.", "{s} has a house in {v}.", "{s} moved to {v} long ago."),
        (
            "Where does {s} live?",
            "In which town does {s} live?",
            "What town is the home of {s}?",
            "Where is the house of {s}?",
        ),
        ("Who lives in {v}?", "Who has a home in {v}?"),
    ),
    "job": Relation(
        _one_of(JOBS),
        ("{s} works as a {v}.", "{s} is a {v}.", "{s} became a {v}.", "The job of {s} is {v}."),
        ("What is the job of {s}?", "What does {s} do for work?", "What does {s} work as?", "Which job does {s} have?"),
        ("Who works as a {v}?", "Who is the {v}?"),
    ),
    "born": Relation(
        _year,
        (
            "{s} was born in {v}.",
            "The birth of {s} was in {v}.",
            "{s} came into the world in {v}.",
            "In {v}, {s} was born.",
        ),
        (
            "When was {s} born?",
            "In what year was {s} born?",
            "What is the birth year of {s}?",
            "In which year did {s} come into the world?",
        ),
        ("Who was born in {v}?",),
    ),
    "pet": Relation(
        _one_of(ANIMALS),
        ("{s} keeps a {v}.", "{s} has a pet {v}.", "The pet of {s} is a {v}.", "A {v} lives with {s}."),
        (
            "What pet does {s} have?",
            "Which animal does {s} keep?",
            "What animal lives with {s}?",
            "What kind of pet has {s}?",
        ),
        ("Who has a {v}?", "Who keeps a {v}?"),
    ),
    "food": Relation(
        _one_of(FOODS),
        ("{s} loves {v}.", "{s} eats {v} every day.", "The favorite food of {s} is {v}.", "{s} often cooks {v}."),
        (
            "What food does {s} love?",
            "What does {s} like to eat?",
            "What is the favorite food of {s}?",
            "Which food does {s} like best?",
        ),
        ("Who loves {v}?", "Who eats {v}?"),
    ),
    "instrument": Relation(
        _one_of(INSTRUMENTS),
        (
            "{s} plays the {v}.",
            "{s} learned the {v} as a child.",
            "On Sundays {s} plays the {v}.",
            "{s} is good at the {v}.",
        ),
        (
            "What does {s} play?",
            "Which instrument does {s} play?",
            "What instrument did {s} learn?",
            "What is {s} good at?",
        ),
        ("Who plays the {v}?",),
    ),
    "friend": Relation(
        _name,
        (
            "{s} has a friend named {v}.",
            "The best friend of {s} is {v}.",
            "{s} often visits {v}.",
            "{s} went to school with {v}.",
        ),
        (
            "Who is the friend of {s}?",
            "Who is the best friend of {s}?",
            "Whom does {s} know from school?",
            "Whom does {s} visit?",
        ),
    ),
}
TOWN = {
    "river": Relation(
        _name,
        (
            "{s} lies on the river {v}.",
            "The river {v} runs through {s}.",
            "{s} was built on the river {v}.",
            "People of {s} swim in the river {v}.",
        ),
        (
            "On which river does {s} lie?",
            "What river runs through {s}?",
            "Which river is at {s}?",
            "What is the river of {s}?",
        ),
        ("Which town lies on the river {v}?",),
    ),
    "founded": Relation(
        _year,
        (
            "{s} was founded in {v}.",
            "In {v}, people founded {s}.",
            "The town of {s} dates from {v}.",
            "{s} was first built in {v}.",
        ),
        (
            "When was {s} founded?",
            "In what year was {s} founded?",
            "What year does {s} date from?",
            "In which year was {s} built?",
        ),
        ("Which town was founded in {v}?",),
    ),
    "mayor": Relation(
        _name,
        (
            "The mayor of {s} is {v}.",
            "{s} is led by mayor {v}.",
            "{v} is the mayor of {s}.",
            "The people of {s} chose {v} as mayor.",
        ),
        (
            "Who is the mayor of {s}?",
            "Who leads {s}?",
            "Who was chosen as mayor of {s}?",
            "What is the name of the mayor of {s}?",
        ),
        ("Of which town is {v} the mayor?",),
    ),
    "goods": Relation(
        _one_of(GOODS),
        (
            "{s} is known for its {v}.",
            "People in {s} make {v}.",
            "The shops of {s} sell {v}.",
            "{s} is famous for {v}.",
        ),
        (
            "What is {s} known for?",
            "What do people make in {s}?",
            "What do the shops of {s} sell?",
            "What is {s} famous for?",
        ),
        ("Which town is known for {v}?",),
    ),
    "fair": Relation(
        _one_of(MONTHS),
        (
            "The fair of {s} is in {v}.",
            "{s} holds a fair each {v}.",
            "Every {v} there is a fair in {s}.",
            "In {v}, {s} has its fair.",
        ),
        (
            "When is the fair of {s}?",
            "In which month is the fair of {s}?",
            "When does {s} hold a fair?",
            "What month is the fair in {s}?",
        ),
        ("Which town has a fair in {v}?",),
    ),
}
SHIP = {
    "captain": Relation(
        _name,
        (
            "The captain of the {s} was {v}.",
            "{v} was captain of the {s}.",
            "The {s} sailed under captain {v}.",
            "Captain {v} led the {s}.",
        ),
        (
            "Who was the captain of the {s}?",
            "Who led the {s}?",
            "Under which captain did the {s} sail?",
            "What was the name of the captain of the {s}?",
        ),
        ("Which ship did {v} lead?",),
    ),
    "port": Relation(
        _name,
        (
            "The {s} sailed from {v}.",
            "The {s} left the port of {v}.",
            "The home port of the {s} was {v}.",
            "The {s} began its trip in {v}.",
        ),
        (
            "Where did the {s} sail from?",
            "Which port did the {s} leave?",
            "What was the home port of the {s}?",
            "Where did the {s} begin its trip?",
        ),
        ("Which ship sailed from {v}?",),
    ),
    "cargo": Relation(
        _one_of(FOODS + GOODS),
        (
            "The {s} carried {v}.",
            "The {s} was full of {v}.",
            "The {s} had {v} on board.",
            "The cargo of the {s} was {v}.",
        ),
        (
            "What did the {s} carry?",
            "What was the cargo of the {s}?",
            "What did the {s} have on board?",
            "What was the {s} full of?",
        ),
        ("Which ship carried {v}?",),
    ),
    "color": Relation(
        _one_of(COLORS),
        (
            "The {s} was painted {v}.",
            "The {s} had {v} sails.",
            "The flag of the {s} was {v}.",
            "The {s} was a {v} ship.",
        ),
        (
            "What color was the {s}?",
            "Which color had the {s}?",
            "What was the color of the {s}?",
            "In what color was the {s}?",
        ),
        ("Which ship was {v}?",),
    ),
    "sank": Relation(
        _year,
        (
            "The {s} sank in {v}.",
            "In {v}, the {s} was lost.",
            "The {s} was lost at sea in {v}.",
            "The last trip of the {s} was in {v}.",
        ),
        (
            "When did the {s} sink?",
            "In what year was the {s} lost?",
            "When was the {s} lost?",
            "In which year did the {s} sink?",
        ),
        ("Which ship sank in {v}?",),
    ),
}
SCHEMAS: dict[str, dict[str, Relation]] = {"person": PERSON, "town": TOWN, "ship": SHIP}
