"""Answered examples before a question: the few shots that an adapter is held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data import read_rows
from training.data.shape import Message, Turn, chosen, turns
from training.errors import DataError


@dataclass(frozen=True, slots=True)
class Shots:
    """The last answer of each of the first rows of a file, with what stands before it."""

    turns: tuple[Turn, ...]
    file: str

    @property
    def told(self) -> str:
        """What a card says of how it was asked."""
        return f"{len(self.turns)} shots of {self.file}"

    @property
    def answers(self) -> int:
        """How many answers of a chat they are: those of their earlier turns too."""
        return sum(message["role"] == "assistant" for message in self._messages)

    @property
    def _messages(self) -> list[Message]:
        found: list[Message] = []
        for turn in self.turns:
            assert turn.asked is not None, "refused by read_shots"
            if not isinstance(turn.asked, str):
                said = {"role": "assistant", "content": turn.answer}
                found += [message for message in turn.asked if message["role"] != "system"]
                found.append(said)
        return found

    def before(self, place: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the shots before what it asks: as turns of its chat, or as text before its
        text with a blank line between. Raises DataError where it is asked otherwise than they are,
        or is one of them."""
        asked = turns(place, row)[0].asked
        if asked is None:
            raise DataError(f"{place}: a document asks nothing that --shots could stand before")
        plain = isinstance(asked, str)
        if any(isinstance(turn.asked, str) != plain for turn in self.turns):
            kinds = ("plain prompts", "chats") if plain else ("chats", "plain prompts")
            raise DataError(
                f"{place}: the questions are {kinds[0]}, and {self.file} has {kinds[1]}"
            )
        if _key(asked) in {_key(turn.asked) for turn in self.turns}:
            raise DataError(
                f"{place}: this question is among the examples of {self.file}, so its answer would "
                "be shown; name a file without it"
            )
        if plain:
            lead = "".join(f"{turn.asked}{turn.answer}\n\n" for turn in self.turns)
            return {**row, "prompt": f"{lead}{row['prompt']}"}
        last = turns(place, row)[-1]
        assert not isinstance(last.asked, str | None), "a chat is one throughout"
        said = [*last.asked, {"role": "assistant", "content": last.answer}]
        first = [message for message in said[:1] if message["role"] == "system"]
        return {"messages": [*first, *self._messages, *said[len(first) :]]}


def _key(asked: Sequence[Message] | str | None) -> str:
    if isinstance(asked, str | None):
        return json.dumps(asked)
    return json.dumps([dict(message) for message in asked if message["role"] != "system"])


def read_shots(path: Path, count: int, columns: Mapping[Any, str] | None = None) -> Shots:
    """The first `count` rows of a file. Raises DataError where it has fewer or one asks nothing."""
    found: list[Turn] = []
    for place, row in read_rows(path):
        if len(found) == count:
            break
        turn = turns(place, chosen(row, columns or {}))[-1]
        if turn.asked is None:
            raise DataError(f"{place}: a document is no example; a question and its answer are")
        found.append(turn)
    if len(found) < count:
        raise DataError(f"{path}: {len(found)} examples, and --shots {count} needs as many")
    return Shots(tuple(found), path.name)
