"""What a row asks, and what the model is to say. A row is one of

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}   ShareGPT's
{"prompt": "…", "completion": "…"}
{"instruction": "…", "input": "…", "output": "…"}      Alpaca's; input may be absent or empty
{"text": "…"}                                          a document: all of it is to be said
{"text": "…", "continues": true}                       a piece of one: no stop token after it

An instruction is a chat of one turn, with the input after a blank line, so that serving renders
it as training did. As in LLaMA-Factory's files it may have a system prompt and a history of pairs
[question, answer], whose answers bear loss too, and conversations a system prompt. An assistant's
message with "weight": 0, as OpenAI's files have it, bears none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.template import ROLES
from training.config import Column
from training.errors import DataError

Message = Mapping[str, Any]
# (what a row has, what it may have)
SHAPES: Sequence[tuple[frozenset[str], frozenset[str]]] = (
    (frozenset(("messages",)), frozenset(("tools",))),
    (frozenset(("conversations",)), frozenset(("system", "tools"))),
    (frozenset(("prompt", "completion")), frozenset()),
    (frozenset(("instruction", "output")), frozenset(("input", "system", "history"))),
    (frozenset(("text",)), frozenset(("continues",))),
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
    """Every answer in the row that bears loss. Raises DataError that names place and field."""
    keys = set(row)
    if not any(needed <= keys <= needed | more for needed, more in SHAPES):
        raise DataError(
            f"{place}: fields {sorted(keys)}; one of messages, conversations, prompt and "
            "completion, instruction (and input, system, history) and output, or text is needed; "
            "data.columns says which others to take"
        )
    if _parsed(row.get("tools")) not in (None, "", []):
        raise DataError(f"{place}: tools: calls of tools are not trained here; leave such rows out")
    if "messages" in keys:
        return _of_chat(place, "messages", _messages(place, _parsed(row["messages"])))
    if "conversations" in keys:
        said = _conversation(place, _parsed(row["conversations"]), row.get("system"))
        return _of_chat(place, "conversations", said)
    if not isinstance(row.get("continues", True), bool):
        raise DataError(
            f"{place}: continues is {_shown(row['continues'])}; true or false is needed"
        )
    for key in row.keys() - {"continues", "history"}:
        if not isinstance(row[key], str):
            raise DataError(
                f"{place}: {' and '.join(row)} must be strings, {key} is a "
                f"{type(row[key]).__name__}"
            )
    if "text" in keys:
        return [Turn(None, row["text"], "text", ends=not row.get("continues", False))]
    if "prompt" in keys:
        return [Turn(row["prompt"], row["completion"], "completion")]
    return _of_instruction(place, row)


def _of_instruction(place: str, row: Mapping[str, Any]) -> list[Turn]:
    said = _system(row.get("system"))
    found = []
    for number, (asked, answer) in enumerate(_history(place, _parsed(row.get("history")))):
        said.append({"role": "user", "content": asked})
        found.append(Turn(tuple(said), answer, f"history[{number}][1]"))
        said.append({"role": "assistant", "content": answer})
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    return [*found, Turn([*said, {"role": "user", "content": asked}], row["output"], "output")]


def _history(place: str, given: Any) -> list[tuple[str, str]]:
    if given is None or given == "":
        return []
    pairs = given if isinstance(given, list) else [given]
    for number, pair in enumerate(pairs):
        texts = pair if isinstance(pair, list) else ()
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: history[{number}] needs a question and its answer, strings")
    return [(asked, answer) for asked, answer in pairs]


def _system(text: str | None) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


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
        keys = ("prompt", "instruction", "input", "text", "system", "history")
        asked = [row[key] for key in keys if row.get(key)]
    return json.dumps(asked, ensure_ascii=False, sort_keys=True, default=str)


def _speaker(message: Mapping[str, Any]) -> Any:
    name = message.get("role", message.get("from"))
    return SPEAKERS.get(name, name) if isinstance(name, str) else name


def _of_chat(place: str, field: str, messages: list[Message]) -> list[Turn]:
    said = [{name: m[name] for name in ("role", "content")} for m in messages]
    found = [
        Turn(said[:index], message["content"], f"{field}[{index}]")
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1)
    ]
    if not found:
        silent = any(message["role"] == "assistant" for message in messages)
        which = "every assistant turn has weight 0" if silent else "no assistant turn"
        raise DataError(f"{place}: {field}: {which}, so no token bears loss")
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
            and {"role", "content"} <= set(message) <= {"role", "content", "weight"}
            and isinstance(message["content"], str)
        )
        if not well_formed:
            raise DataError(f"{place}: messages[{index}] needs role and content, both strings")
        if message.get("weight", 1) not in (0, 1):
            weight = _shown(message["weight"])
            raise DataError(f"{place}: messages[{index}].weight is {weight}; 0 or 1 is needed")
        if message["role"] not in ROLES:
            role = _shown(message["role"])
            raise DataError(f"{place}: messages[{index}].role is {role}; one of {ROLES} is needed")
    return messages


def _shown(value: Any) -> str:
    """What stands where a word or a number belongs. A longer text may be what somebody wrote: it
    belongs in no error, which is kept and shown elsewhere."""
    if isinstance(value, str):
        return repr(value) if re.fullmatch(r"\w{1,16}", value) else "a text"
    return repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"


def _conversation(place: str, said: Any, system: Any) -> list[Message]:
    """ShareGPT's turns as messages, after a system prompt that stands beside them."""
    if not isinstance(system, str | None):
        raise DataError(f"{place}: system must be a string, it is a {type(system).__name__}")
    if not isinstance(said, list):
        raise DataError(f"{place}: conversations must be a list, it is a {type(said).__name__}")
    found = _system(system)
    for index, turn in enumerate(said):
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("from", "value")
        ):
            raise DataError(f"{place}: conversations[{index}] needs from and value, both strings")
        if turn["from"] not in SPEAKERS:
            raise DataError(
                f"{place}: conversations[{index}].from is {_shown(turn['from'])}; "
                f"one of {', '.join(SPEAKERS)} is needed"
            )
        if system and SPEAKERS[turn["from"]] == "system":
            raise DataError(f"{place}: conversations[{index}] and system: one of them is needed")
        found.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return found
