"""What a row asks, and what the model is to say. A row is one of

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}   ShareGPT's
{"prompt": "…", "completion": "…"}
{"instruction": "…", "input": "…", "output": "…"}      Alpaca's; input may be absent or empty
{"text": "…"}                                          a document: all of it is to be said
{"text": "…", "continues": true}                       a piece of one: no stop token after it

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
    {"conversations"},
    {"prompt", "completion"},
    {"instruction", "output"},
    {"instruction", "input", "output"},
    {"text"},
    {"text", "continues"},
)
# ShareGPT's names of who speaks.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer, and what stands before it: a chat, plain text, or nothing (a document)."""

    asked: Sequence[Message] | str | None
    answer: str
    field: str  # where the answer stands in the row
    ends: bool = True  # a stop token follows


def turns(place: str, row: Mapping[str, Any]) -> list[Turn]:
    """Every answer in the row. Raises DataError that names place and field."""
    keys = set(row)
    if keys not in SHAPES:
        raise DataError(
            f"{place}: fields {sorted(keys)}; one of messages, conversations, prompt and "
            "completion, instruction (and input) and output, or text is needed; data.columns says "
            "which others to take"
        )
    if keys == {"messages"}:
        return _of_chat(place, "messages", _messages(place, _parsed(row["messages"])))
    if keys == {"conversations"}:
        said = _parsed(row["conversations"])
        return _of_chat(place, "conversations", _conversation(place, said))
    if not isinstance(row.get("continues", True), bool):
        raise DataError(f"{place}: continues is {row['continues']!r}; true or false is needed")
    for key in row.keys() - {"continues"}:
        if not isinstance(row[key], str):
            raise DataError(
                f"{place}: {' and '.join(row)} must be strings, {key} is a "
                f"{type(row[key]).__name__}"
            )
    if "text" in keys:
        return [Turn(None, row["text"], "text", ends=not row.get("continues", False))]
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
    messages = _parsed(row.get("messages", row.get("conversations")))
    if isinstance(messages, list):
        asked: Any = []
        for message in messages:
            if isinstance(message, dict) and _speaker(message) == "assistant":
                break
            asked.append(message)
    else:
        asked = [row[key] for key in ("prompt", "instruction", "input", "text") if row.get(key)]
    return json.dumps(asked, ensure_ascii=False, sort_keys=True, default=str)


def _speaker(message: Mapping[str, Any]) -> Any:
    name = message.get("role", message.get("from"))
    return SPEAKERS.get(name, name) if isinstance(name, str) else name


def _of_chat(place: str, field: str, messages: list[Message]) -> list[Turn]:
    found = [
        Turn(messages[:index], message["content"], f"{field}[{index}]")
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if not found:
        raise DataError(f"{place}: {field}: no assistant turn, so no token bears loss")
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


def _conversation(place: str, said: Any) -> list[Message]:
    """ShareGPT's turns as messages."""
    if not isinstance(said, list):
        raise DataError(f"{place}: conversations must be a list, it is a {type(said).__name__}")
    found: list[Message] = []
    for index, turn in enumerate(said):
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("from", "value")
        ):
            raise DataError(f"{place}: conversations[{index}] needs from and value, both strings")
        if turn["from"] not in SPEAKERS:
            raise DataError(
                f"{place}: conversations[{index}].from is {turn['from']!r}; "
                f"one of {', '.join(SPEAKERS)} is needed"
            )
        found.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return found
