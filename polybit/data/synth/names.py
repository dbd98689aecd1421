"""Invented names and the word lists; which names are held out is a property of the name itself.

A name is held out of training when the checksum of its letters is divisible by ten. So there are unlimited names on
both sides, nothing has to be stored, and a model cannot have memorised a name it is asked to read.
"""

from __future__ import annotations

import zlib
from random import Random

ONSETS = [
    "b",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gr",
    "kr",
    "tr",
    "st",
    "sh",
    "th",
    "ch",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
CODAS = ("", "", "", "n", "l", "r", "s", "k", "m", "nd", "x")

JOBS = [
    "baker",
    "teacher",
    "doctor",
    "farmer",
    "painter",
    "pilot",
    "singer",
    "writer",
    "nurse",
    "cook",
    "judge",
    "sailor",
    "tailor",
    "miner",
    "clerk",
    "guard",
]
COLORS = ["red", "blue", "green", "white", "black", "yellow", "brown", "pink", "gray", "purple"]
ANIMALS = ["cat", "dog", "horse", "goat", "duck", "rabbit", "parrot", "turtle", "mouse", "sheep"]
FOODS = ["rice", "bread", "soup", "cheese", "honey", "fish", "pasta", "salad", "cake", "beans", "plums", "curry"]
INSTRUMENTS = ["piano", "drum", "violin", "guitar", "flute", "harp", "trumpet", "cello"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
GOODS = [
    "shoes",
    "boats",
    "lamps",
    "clocks",
    "chairs",
    "carpets",
    "bells",
    "toys",
    "knives",
    "candles",
    "bicycles",
    "windows",
]
OBJECTS = [
    "apples",
    "books",
    "coins",
    "pens",
    "eggs",
    "stamps",
    "shells",
    "cards",
    "marbles",
    "stickers",
    "pears",
    "cookies",
    "balls",
    "keys",
    "buttons",
    "stones",
]


def checksum(text: str) -> int:
    """A number that depends on the text alone, the same on every machine and in every process."""
    return zlib.crc32(text.encode())


def is_held_out(name: str) -> bool:
    """Whether a name belongs to the evaluation side."""
    return checksum(name) % 10 == 0


def draw_name(rng: Random, *, held_out: bool) -> str:
    """A capitalised name of two or three syllables from the wanted side."""
    while True:
        syllables = rng.choice((2, 2, 2, 3))
        parts = []
        for index in range(syllables):
            closed = index == syllables - 1 or rng.random() < 0.2
            parts.append(rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if closed else ""))
        name = "".join(parts).capitalize()
        if is_held_out(name) == held_out:
            return name


def draw_names(rng: Random, count: int, *, held_out: bool) -> list[str]:
    """Different names."""
    names: list[str] = []
    while len(names) < count:
        name = draw_name(rng, held_out=held_out)
        if name not in names:
            names.append(name)
    return names
