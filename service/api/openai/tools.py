"""Tools: how a prompt shows them, and how calls come out of the text.

The form is the one of Hermes and Qwen, a JSON object between <tool_call> and </tool_call>. It is
used where the chat template defines it, and where the template knows nothing of tools: then a
system message says what they are and how to call one. A template that shows tools in another form
keeps it, and its calls stay text; unless a call is required: then the output is guided to be one.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.grammars import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Json = dict[str, Any]
Form = Literal["template", "marked", "described"]

_TOLD = """\
You can call these functions, given by their JSON schemas:
{tools}
To call one, reply with its name and arguments, and nothing else:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # JSON

    def shown(self, index: int | None = None) -> Json:
        """As OpenAI has it; in a stream with its index."""
        place = {} if index is None else {"index": index}
        return place | {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def form_of(template: str) -> Form:
    """What a chat template makes of tools: shows them in a form of its own, shows them in ours, or
    knows nothing of them."""
    if not re.search(r"\btools\b", template):
        return "described"
    return "marked" if OPEN in template else "template"


def described(tools: Sequence[Mapping[str, Any]], messages: list[Json]) -> list[Json]:
    """The messages with a system message that says what the tools are. Calls and their results
    become text, since the template has no place for them."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = _TOLD.format(tools=lines) if tools else ""
    plain = [_plain(message) for message in messages]
    if told and plain and plain[0]["role"] == "system":
        plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{told}".strip()}
    elif told:
        plain.insert(0, {"role": "system", "content": told})
    return plain


def _plain(message: Json) -> Json:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = [
        f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
        for call in message.get("tool_calls", ())
    ]
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {"role": message["role"], "content": content}


_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def required(tools: Sequence[Mapping[str, Any]], form: Form) -> Grammar:
    """An output that is one call of one of these tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": _closed(tool["function"].get("parameters") or {"type": "object"}),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = _lifted({"anyOf": calls} if len(calls) > 1 else calls[0])
    if form == "template":
        return Grammar.schema(schema, "tools")
    strict = {**schema, "x-guidance": _COMPACT}
    text = json.dumps(strict, ensure_ascii=False)
    return Grammar("lark", f'start: "{OPEN}\\n" call "\\n{CLOSE}"\ncall: %json {text}\n', "tools")


def _closed(schema: Json) -> Json:
    """No other arguments than those that are named, unless it says that there may be."""
    return {"additionalProperties": False, **schema} if "properties" in schema else schema


def _lifted(schema: Json) -> Json:
    """Definitions of the parameters at the top, where `#/$defs/…` looks for them."""
    found: Json = {}
    for call in schema.get("anyOf", [schema]):
        given = call["properties"]["arguments"]
        for name in ("$defs", "definitions"):
            if isinstance(given.get(name), dict):
                found.setdefault(name, {}).update(given[name])
    return {**schema, **found}


class CallReader:
    """Splits an output into text and calls, piece by piece. What may begin a call is held back."""

    def __init__(self, bare: bool = False) -> None:
        """`bare`: the whole output is one call, without marks around it."""
        self._bare = bare
        self._held = ""
        self._inside = bare
        self.calls: list[Call] = []

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Text that is certain, and calls that are complete."""
        self._held += piece
        said, before = "", len(self.calls)
        while not self._bare:
            if self._inside:
                body, mark, rest = self._held.partition(CLOSE)
                if not mark:
                    break
                said += self._take(body)
                self._held, self._inside = rest, False
                continue
            text, mark, rest = self._held.partition(OPEN)
            if not mark:
                keep = _overlap(text, OPEN)
                said += text[: len(text) - keep]
                self._held = text[len(text) - keep :]
                break
            said += text
            self._held, self._inside = rest, True
        return said, self.calls[before:]

    def finish(self) -> tuple[str, list[Call]]:
        """The output is over: a call whose end mark never came still counts if it is whole."""
        before = len(self.calls)
        said = self._take(self._held, "") if self._inside and self._held else self._held
        self._held, self._inside = "", False
        return said, self.calls[before:]

    def _take(self, body: str, close: str = CLOSE) -> str:
        """Read one call; what is none stays text."""
        call = _read(body)
        if call is None:
            return body if self._bare else f"{OPEN}{body}{close}"
        self.calls.append(call)
        return ""


def _read(body: str) -> Call | None:
    try:
        found = json.loads(body)
        name, arguments = found["name"], found.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(name, arguments)


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may begin the mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
