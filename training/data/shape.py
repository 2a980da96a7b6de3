"""What a row asks, and what the model is to say. A row is one of

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
{"prompt": "…", "completion": "…"}
{"instruction": "…", "input": "…", "output": "…"}      Alpaca's; input may be absent or empty
{"text": "…"}                                          a document: all of it is to be said

An instruction is a chat of one turn, with the input after a blank line, so that serving renders
it as training did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.template import ROLES
from training.config import Column
from training.errors import DataError

Message = Mapping[str, str]
SHAPES = (
    {"messages"},
    {"prompt", "completion"},
    {"instruction", "output"},
    {"instruction", "input", "output"},
    {"text"},
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer, and what stands before it: a chat, plain text, or nothing (a document)."""

    asked: Sequence[Message] | str | None
    answer: str
    field: str  # where the answer stands in the row


def turns(place: str, row: Mapping[str, Any]) -> list[Turn]:
    """Every answer in the row. Raises DataError that names place and field."""
    keys = set(row)
    if keys not in SHAPES:
        raise DataError(
            f"{place}: fields {sorted(keys)}; one of messages, prompt and completion, instruction "
            "(and input) and output, or text is needed; data.columns says which others to take"
        )
    if keys == {"messages"}:
        return _of_chat(place, row["messages"])
    for key in row:
        if not isinstance(row[key], str):
            raise DataError(
                f"{place}: {' and '.join(row)} must be strings, {key} is a "
                f"{type(row[key]).__name__}"
            )
    if keys == {"text"}:
        return [Turn(None, row["text"], "text")]
    if keys == {"prompt", "completion"}:
        return [Turn(row["prompt"], row["completion"], "completion")]
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    return [Turn([{"role": "user", "content": asked}], row["output"], "output")]


def chosen(row: Mapping[str, Any], columns: Mapping[Column, str]) -> dict[str, Any]:
    """The row with its fields named as above; `columns` maps those names to the row's own.

    A field that the row lacks stays away, so that `turns` can say which.
    """
    if not columns:
        return dict(row)
    return {field: row[column] for field, column in columns.items() if column in row}


def question(row: Mapping[str, Any]) -> str:
    """What the row asks, as one text: rows that ask the same belong on one side of a split."""
    messages = _parsed(row.get("messages"))
    if isinstance(messages, list):
        asked: Any = []
        for message in messages:
            if isinstance(message, dict) and message.get("role") == "assistant":
                break
            asked.append(message)
    else:
        asked = [row[key] for key in ("prompt", "instruction", "input", "text") if row.get(key)]
    return json.dumps(asked, ensure_ascii=False, sort_keys=True, default=str)


def _of_chat(place: str, given: Any) -> list[Turn]:
    messages = _messages(place, _parsed(given))
    found = [
        Turn(messages[:index], message["content"], f"messages[{index}]")
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if not found:
        raise DataError(f"{place}: messages: no assistant turn, so no token bears loss")
    return found


def _parsed(messages: Any) -> Any:
    """A table of texts holds messages as JSON."""
    if not isinstance(messages, str):
        return messages
    try:
        return json.loads(messages)
    except ValueError:
        return messages


def _messages(place: str, messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages must be a list, it is a {type(messages).__name__}")
    for index, message in enumerate(messages):
        well_formed = (
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and isinstance(message["content"], str)
        )
        if not well_formed:
            raise DataError(f"{place}: messages[{index}] needs role and content, both strings")
        if message["role"] not in ROLES:
            raise DataError(
                f"{place}: messages[{index}].role is {message['role']!r}; one of {ROLES} is needed"
            )
    return messages
