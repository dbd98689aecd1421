"""Functions a model may call: told to it by the template or in a system turn, and read out of its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TOLD = (
    "You may call one of these functions. To call one, answer with nothing but\n"
    f'{OPEN}{{"name": NAME, "arguments": {{...}}}}{CLOSE}\n'
    "Functions as JSON:\n"
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the model wants called; arguments as JSON text."""

    name: str
    arguments: str


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat with the functions told in its system turn, for templates that know no tools; turns with calls and
    results become plain ones."""
    told = TOLD + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    turns = [plain_turn(turn) for turn in messages]
    if turns and turns[0]["role"] == "system":
        turns[0] = {"role": "system", "content": f"{turns[0]['content']}\n\n{told}"}
        return turns
    return [{"role": "system", "content": told}, *turns]


def plain_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with nothing but role and content."""
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>{turn['content']}</tool_response>"}
    calls = [
        OPEN
        + json.dumps({"name": call["function"]["name"], "arguments": read_json(call["function"]["arguments"])})
        + CLOSE
        for call in turn.get("tool_calls", ())
    ]
    return {"role": turn["role"], "content": "\n".join([turn["content"], *calls] if turn["content"] else calls or [""])}


def read_json(text: str) -> Any:
    """The value of a JSON text, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def call_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call to one of these functions."""
    each = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return each[0] if len(each) == 1 else {"anyOf": each}


def read_calls(text: str, names: Sequence[str], *, forced: bool) -> tuple[str, list[ToolCall]]:
    """(what is left as text, the calls in it). Forced: the whole answer is one call without marks. A call that cannot
    be read, or of a function nobody named, stays text."""
    if forced:
        call = one_call(text, names)
        return ("", [call]) if call else (text, [])
    left, calls = "", []
    rest = text
    while OPEN in rest:
        before, _, after = rest.partition(OPEN)
        inner, mark, behind = after.partition(CLOSE)
        call = one_call(inner, names)
        if call is None:
            left, rest = left + before + OPEN, after
            continue
        left, rest = left + before, behind if mark else ""
        calls.append(call)
    left += rest
    return (left.strip() if calls else text), calls


def one_call(text: str, names: Sequence[str]) -> ToolCall | None:
    """The call a JSON text is, or None."""
    value = read_json(text.strip())
    if not isinstance(value, Mapping) or value.get("name") not in names:
        return None
    return ToolCall(str(value["name"]), json.dumps(value.get("arguments", {}), ensure_ascii=False))


def may_be_call(text: str) -> bool:
    """Whether an answer so far may turn out to begin with a call: its text is then held back."""
    start = text.lstrip()
    return start.startswith(OPEN) or OPEN.startswith(start)
