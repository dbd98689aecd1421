"""What is wrong with a body, in one sentence: of all that a check found, what the client is likeliest to have meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_PLACE = 200  # characters of the place of a fault that are told


def refusal(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(the place of the fault as in messages.0.content, a sentence that names it) of pydantic's errors.

    Where a field may be several things, each of them says what it misses. The one that read deepest is what was meant:
    of a list of parts with one picture the part, not that a list is no text. What may stand at that place is joined.
    """
    places = [place_of(error["loc"], whole=error["type"] == "extra_forbidden") for error in errors]
    deepest = max(map(len, places))
    at = next(place for place in places if len(place) == deepest)
    here = [error for error, place in zip(errors, places, strict=True) if place == at]
    unlike = [error for error in here if not error["type"].endswith("_type")]  # right in kind, wrong in value
    first, place = (unlike or here)[0], ".".join(map(str, at))[:MOST_PLACE]
    if first["type"] == "extra_forbidden":
        return place, f"{place} is not supported by this server: leave it out"
    if first["type"] == "json_invalid":
        return place, f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'mend it')}"
    alike = [error for error in unlike if error["type"] == first["type"]] or here
    said = " or ".join(dict.fromkeys(plain(error["msg"]) for error in alike))
    return place, f"{place or 'the body'}: {said}"


def place_of(loc: Sequence[Any], *, whole: bool = False) -> list[Any]:
    """Where a fault is in the body, without pydantic's names for the ways it tried. whole: the last part is a field,
    however it is written."""
    found: list[Any] = []
    tagged = False  # the next text is the value of `type` that chose a way
    for number, part in enumerate(loc):
        if not isinstance(part, str) or (whole and number == len(loc) - 1):
            found.append(part)
        elif part.startswith("list[tagged-union["):
            tagged = True
        elif tagged:
            tagged = False
        elif not is_way(part) and part != "body":
            found.append(part)
    return found


def is_way(part: str) -> bool:
    """Whether a part of a place is no name of a field: fields are small letters, models begin with a capital."""
    return not part.isidentifier() or part[:1].isupper()


def plain(said: str) -> str:
    """pydantic's sentence without names of ours."""
    return said.removeprefix("Value error, ").split(" or instance of ")[0]
