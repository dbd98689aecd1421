"""Files changed by chance: bytes anywhere, or values of a JSON document replaced by odd ones. A number makes a case."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

HTML = '<script>alert("x")</script>'
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**70),
    10**400,
    0.5,
    -0.0,
    1e308,
    -1e-320,
    float("nan"),
    float("inf"),
    "",
    " ",
    "w4",
    "w99",
    "w4a8",
    "../../etc/passwd",
    "/dev/zero",
    "\x00",
    "\ud83d",
    "é" * 300,
    "9" * 5000,
    HTML,
    "'\"><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "$x_{",
    "$$",
    "\\frac",
    "a\nb",
    "<b>",
    "&lt;",
    [],
    {},
    [[]],
    [0],
    [None],
    {"": 0},
    {"value": 1},
    [1] * 300,
    {"a": {"a": {"a": {}}}},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a document, the document's own first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed_value(random: Random, value: Any, alike: list[Any]) -> Any:
    """Another value in the place of one; alike: values of the same document, which fit more often."""
    kind = random.randrange(6)
    if kind == 0 and isinstance(value, str) and value:
        at = random.randrange(len(value))
        return value[:at] + random.choice((HTML, "\x00", "é", "", "-", "9")) + value[at + random.randrange(2) :]
    if kind == 1 and isinstance(value, int | float) and not isinstance(value, bool):
        return random.choice((-value, value + 1, value - 1, value * 2, value // 3, value * 10**9, str(value)))
    if kind == 2 and isinstance(value, list) and value:
        return random.choice((value[1:], value * 2, value[::-1], [value], value[:1]))
    if kind == 3:
        return random.choice(alike)
    return random.choice(ODD)


def changed_document(random: Random, document: Any, changes: int) -> Any:
    """A document with some values replaced, removed, moved or added. The one given is not touched."""
    document = copy.deepcopy(document)
    for _ in range(changes):
        path = random.choice(places(document))
        if not path:
            if random.random() < 0.1:
                document = copy.deepcopy(random.choice(ODD))
            continue
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        what, key = random.randrange(8), path[-1]
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[random.choice((HTML, "", "x" * 2000, "\ud83d", str(key) + " ", "__class__"))] = holder.pop(key)
        elif what == 2 and isinstance(holder, dict):
            holder[random.choice(("extra", HTML, "layers", "default", "plan"))] = copy.deepcopy(random.choice(ODD))
        else:
            alike = [document] if len(path) < 2 else list(holder.values() if isinstance(holder, dict) else holder)
            holder[key] = copy.deepcopy(changed_value(random, holder[key], alike))
    return document


def changed_bytes(random: Random, data: bytes) -> bytes:
    """Bytes flipped, cut off, taken out, put in, repeated, or numbers of eight bytes overwritten."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(found) + 1)
        kind = random.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif kind == 1 and random.random() < 0.3:
            del found[at:]
        elif kind == 2:
            del found[at : at + random.choice((1, 2, 8, 100))]
        elif kind == 3:
            found[at:at] = random.choice(
                (b"\x00", b"{", b'"', b"[", b"\xff", b"}", b",", b"1e999", b"NaN", b"\n", b"<b>")
            )
        elif kind == 4:
            found[at:at] = found[at : at + random.choice((1, 8, 64, 300))]
        elif kind == 5 and len(found) > 8:
            at = random.randrange(min(len(found) - 8, random.choice((64, 10**9))))
            number = random.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, random.randrange(2**16)))
            found[at : at + 8] = number.to_bytes(8, "little")
        elif found and at < len(found):
            found[at] = random.randrange(256)
    return bytes(found)


def changed_text(random: Random, document: Any) -> bytes:
    """A JSON document as changed text: its values, its bytes, both, or deeper and longer than anybody writes."""
    kind = random.randrange(20)
    if kind == 0:
        depth = random.choice((100, 2000, 100_000))
        return random.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    if kind == 1:
        return b'{"plan": ' + b"9" * random.choice((400, 5000)) + b"}"
    if kind > 6:
        document = changed_document(random, document, random.choice((1, 1, 1, 2, 3, 8)))
    data = json.dumps(document).encode()
    return changed_bytes(random, data) if kind < 10 else data
