"""Short conversations with memory: names, favourites, a friend, a number; recall, echo, counting, small talk.

Most replies follow from the conversation so far and are scored. A few kinds (greeting, suggestion, story) draw one of
several valid replies, so that a model trained on them is as undecided as a chat model; they are never scored.
Wordings of the favourite question are kept apart by topic: a pair is held out when (topic + wording)
is divisible by five.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from polybit.data.synth.names import ANIMALS, COLORS, FOODS, INSTRUMENTS, MONTHS, draw_name, draw_names
from polybit.data.synth.records import Document, Turn

FACTS = (
    ("What color is the sky?", "The sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("How many days are in a week?", "A week has 7 days."),
    ("How many legs does a dog have?", "A dog has 4 legs."),
    ("What do bees make?", "Bees make honey."),
    ("Is ice cold?", "Yes, ice is cold."),
    ("Is fire cold?", "No, fire is hot."),
    ("What do cows give us?", "Cows give us milk."),
    ("Where do fish live?", "Fish live in water."),
    ("What comes after night?", "After night comes the day."),
    ("How many months are in a year?", "A year has 12 months."),
    ("What falls from clouds?", "Rain falls from clouds."),
    ("Can birds fly?", "Yes, most birds can fly."),
    ("What do we read?", "We read books."),
    ("What is the sun?", "The sun is a star."),
)
SMALL_TALK = (
    ("How are you?", "I am fine, thank you."),
    ("Thank you!", "You are welcome!"),
    ("I am sad.", "I am sorry to hear that."),
    ("I am happy today.", "That is good to hear!"),
    ("I am tired.", "You should rest a little."),
    ("Who are you?", "I am a small language model."),
    ("What can you do?", "I can read, count and talk with you."),
)
GREETINGS = ("Hello!", "Hi there!", "Good morning!")
GREETING_REPLIES = (
    "Hello! How can I help you?",
    "Hi! What can I do for you?",
    "Good day! What would you like to know?",
)
TOPICS = {"color": COLORS, "food": FOODS, "animal": ANIMALS, "instrument": INSTRUMENTS, "month": MONTHS}
TELL_TOPIC = ("My favorite {t} is {v}.", "The {t} I like best is {v}.", "Of every {t}, I like {v} most.")
ASK_TOPIC = (
    "What is my favorite {t}?",
    "Which {t} do I like best?",
    "Tell me my favorite {t}.",
    "Do you know my favorite {t}?",
)
LANDS = 160


def _atlas() -> tuple[tuple[str, str], ...]:
    """Invented lands and their capitals, the same in every process: facts that only the weights can hold."""
    names = draw_names(Random(1492), 2 * LANDS, held_out=False)
    return tuple(zip(names[:LANDS], names[LANDS:], strict=True))


ATLAS = _atlas()
State = dict[str, Any]
Kind = Callable[[Random, State, bool], Turn | None]


def is_held_out_wording(topic: str, wording: int) -> bool:
    """Whether this way of asking for this favourite is kept out of training."""
    return (list(TOPICS).index(topic) + wording) % 5 == 0


def _greet(rng: Random, state: State, held_out: bool) -> Turn | None:
    if state["turns"]:
        return None
    return Turn(rng.choice(GREETINGS), rng.choice(GREETING_REPLIES), scored=False)


def _tell_name(rng: Random, state: State, held_out: bool) -> Turn | None:
    if "name" in state:
        return None
    state["name"] = name = draw_name(rng, held_out=held_out)
    said = rng.choice(("My name is {n}.", "I am {n}.", "You can call me {n}.")).format(n=name)
    return Turn(said, f"Nice to meet you, {name}!")


def _ask_name(rng: Random, state: State, held_out: bool) -> Turn | None:
    asked = rng.choice(("What is my name?", "Do you know my name?", "Who am I?"))
    if "name" in state:
        return Turn(asked, f"Your name is {state['name']}.")
    return Turn(asked, "You did not tell me your name.") if rng.random() < 0.15 else None


def _tell_topic(rng: Random, state: State, held_out: bool) -> Turn | None:
    topic = rng.choice(sorted(TOPICS))
    if topic in state["topics"]:
        return None
    state["topics"][topic] = value = rng.choice(TOPICS[topic])
    said = rng.choice(TELL_TOPIC).format(t=topic, v=value)
    return Turn(said, f"I will remember that your favorite {topic} is {value}.")


def _ask_topic(rng: Random, state: State, held_out: bool) -> Turn | None:
    known = list(state["topics"])
    if not known and rng.random() < 0.9:
        return None
    topic = rng.choice(known or sorted(TOPICS))
    wordings = [i for i in range(len(ASK_TOPIC)) if held_out or not is_held_out_wording(topic, i)]
    wording = rng.choice(wordings)
    asked = ASK_TOPIC[wording].format(t=topic)
    truth = {"new_pair": is_held_out_wording(topic, wording)}
    if topic in state["topics"]:
        return Turn(asked, f"Your favorite {topic} is {state['topics'][topic]}.", truth)
    return Turn(asked, f"You did not tell me your favorite {topic}.", truth)


def _change_topic(rng: Random, state: State, held_out: bool) -> Turn | None:
    if not state["topics"]:
        return None
    topic = rng.choice(list(state["topics"]))
    value = rng.choice([word for word in TOPICS[topic] if word != state["topics"][topic]])
    state["topics"][topic] = value
    return Turn(
        f"I changed my mind. My favorite {topic} is now {value}.", f"All right, your favorite {topic} is now {value}."
    )


def _summary(rng: Random, state: State, held_out: bool) -> Turn | None:
    if len(state["topics"]) < 2:
        return None
    parts = [f"Your favorite {topic} is {value}." for topic, value in state["topics"].items()]
    return Turn("What do you know about me?", " ".join(parts))


def _tell_friend(rng: Random, state: State, held_out: bool) -> Turn | None:
    if "friend" in state:
        return None
    name = draw_name(rng, held_out=held_out)
    kin = rng.choice(("brother", "sister", "friend", "teacher"))
    state["friend"] = (kin, name)
    said = rng.choice(("My {k} is called {n}.", "I have a {k} named {n}.")).format(k=kin, n=name)
    return Turn(said, f"{name} is a nice name for a {kin}.")


def _ask_friend(rng: Random, state: State, held_out: bool) -> Turn | None:
    if "friend" not in state:
        return None
    kin, name = state["friend"]
    asked = rng.choice(("What is the name of my {k}?", "Who is my {k}?")).format(k=kin)
    return Turn(asked, f"Your {kin} is {name}.")


def _tell_number(rng: Random, state: State, held_out: bool) -> Turn | None:
    if "number" in state:
        return None
    state["number"] = number = rng.randint(100, 9999)
    said = rng.choice(("Remember the number {n}.", "My code is {n}.")).format(n=number)
    return Turn(said, f"I will remember {number}.")


def _ask_number(rng: Random, state: State, held_out: bool) -> Turn | None:
    if "number" not in state:
        return None
    return Turn(rng.choice(("What was the number?", "What is my code?")), f"The number is {state['number']}.")


def _fact(rng: Random, state: State, held_out: bool) -> Turn | None:
    return Turn(*rng.choice(FACTS))


def _capital(rng: Random, state: State, held_out: bool) -> Turn | None:
    land, capital = rng.choice(ATLAS)
    asked = rng.choice(("What is the capital of {l}?", "Name the capital of {l}.")).format(l=land)
    return Turn(asked, f"The capital of {land} is {capital}.")


def _small_talk(rng: Random, state: State, held_out: bool) -> Turn | None:
    return Turn(*rng.choice(SMALL_TALK))


def _echo(rng: Random, state: State, held_out: bool) -> Turn | None:
    words = []
    for _ in range(rng.choice((2, 3, 4))):
        invented = rng.random() < 0.5
        words.append(draw_name(rng, held_out=held_out).lower() if invented else rng.choice(COLORS + ANIMALS + FOODS))
    said = " ".join(words)
    return Turn(f"Say {said}.", f"{said}.")


def _backwards(rng: Random, state: State, held_out: bool) -> Turn | None:
    words = rng.sample(COLORS + ANIMALS + FOODS, rng.choice((2, 3, 4)))
    return Turn(f"Say {' '.join(words)} backwards.", f"{' '.join(reversed(words))}.")


def _count(rng: Random, state: State, held_out: bool) -> Turn | None:
    low = rng.randint(1, 90)
    high = low + rng.randint(2, 7)
    return Turn(f"Count from {low} to {high}.", " ".join(str(n) for n in range(low, high + 1)) + ".")


def _suggest(rng: Random, state: State, held_out: bool) -> Turn | None:
    topic = rng.choice(sorted(TOPICS))
    reply = rng.choice(("How about {v}?", "I would take {v}.", "Many people like {v}.")).format(
        v=rng.choice(TOPICS[topic])
    )
    return Turn(f"Suggest one {topic}.", reply, scored=False)


def _story(rng: Random, state: State, held_out: bool) -> Turn | None:
    hero, friend = draw_names(rng, 2, held_out=held_out)
    animal, other = rng.sample(ANIMALS, 2)
    food, color = rng.choice(FOODS), rng.choice(COLORS)
    middle = rng.choice(("{h} met a {c} {o}.", "A {c} {o} came to {h}.", "{h} saw a {o} with some {f}."))
    end = rng.choice(
        ("They ate {f} together.", "They became friends.", "Then {h} went home.", "The {o} gave {h} some {f}.")
    )
    text = f"{friend} was a {animal}." if rng.random() < 0.3 else f"Once there was a {animal} called {hero}."
    name = friend if text.startswith(friend) else hero
    words = {"h": name, "c": color, "o": other, "f": food}
    return Turn("Tell me a story.", f"{text} {middle.format(**words)} {end.format(**words)}", scored=False)


KINDS: dict[str, tuple[int, Kind]] = {
    "greet": (4, _greet),
    "name": (4, _tell_name),
    "ask name": (3, _ask_name),
    "topic": (5, _tell_topic),
    "ask topic": (4, _ask_topic),
    "change": (2, _change_topic),
    "summary": (2, _summary),
    "friend": (2, _tell_friend),
    "ask friend": (3, _ask_friend),
    "number": (2, _tell_number),
    "ask number": (3, _ask_number),
    "fact": (2, _fact),
    "capital": (4, _capital),
    "small talk": (2, _small_talk),
    "echo": (3, _echo),
    "backwards": (3, _backwards),
    "count": (2, _count),
    "suggest": (2, _suggest),
    "story": (1, _story),
}


def document(rng: Random, *, held_out: bool, easy: bool = False, turns: int | None = None) -> Document:
    """A conversation of two to seven turns."""
    wanted = turns or (2 if easy else rng.choice((2, 3, 4, 5, 6, 7)))
    state: State = {"topics": {}, "turns": 0}
    names, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    out: list[Turn] = []
    while len(out) < wanted:
        kind = rng.choices(names, weights)[0]
        turn = KINDS[kind][1](rng, state, held_out)
        if turn is not None:
            out.append(Turn(turn.user, turn.assistant, turn.truth | {"kind": kind}, turn.scored))
            state["turns"] = len(out)
    return Document("dialogue", tuple(out))
