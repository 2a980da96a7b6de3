"""Example: token ids and which of them bear loss. Rows of JSON Lines in, padded batches out.

A row is one of
  {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
  {"prompt": "…", "completion": "…"}

Loss falls on what the model is to say: the content of an assistant's turn, or the completion, and
the stop token after it. The prompt before it is exactly what serving renders, token for token, so
a conversation of n assistant turns gives n examples.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import InvalidChat
from adapters.template import ROLES, render_chat
from training.errors import DataError

Row = Mapping[str, Any]
Message = Mapping[str, str]
IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True, slots=True)
class Example:
    """`tokens[answer_start:]` bear loss; the last one is the stop token."""

    tokens: tuple[int, ...]
    answer_start: int

    @property
    def loss_tokens(self) -> int:
        return len(self.tokens) - self.answer_start


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Examples padded on the right; `labels` holds IGNORED wherever no loss falls."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64

    @property
    def loss_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of what the model is to say."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each line that is not blank; place is "file:line"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: an object is needed, this is a {type(row).__name__}")
        yield place, row


def examples(rows: Iterable[tuple[str, Row]], tokenizer: Any, max_length: int) -> list[Example]:
    """All rows as examples. Raises DataError at the first row that nothing can be learnt from."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token: no example could end")
    found = [example for place, row in rows for example in _examples(place, row, tokenizer)]
    if not found:
        raise DataError("no rows: at least one example is needed")
    for example in found:
        if len(example.tokens) > max_length:
            raise DataError(
                f"an example has {len(example.tokens)} tokens, data.max_length is {max_length}: "
                f"{tokenizer.decode(example.tokens[:24])!r}…"
            )
    return found


def _examples(place: str, row: Row, tokenizer: Any) -> Iterator[Example]:
    turns = list(_turns(place, row, tokenizer))
    if not turns:
        raise DataError(f"{place}: no assistant turn, so no token bears loss")
    for prompt, answer in turns:
        if not answer:
            raise DataError(f"{place}: an empty answer, so no token but the stop token bears loss")
        said = encode(tokenizer, answer)
        control = set(said) & set(tokenizer.all_special_ids)
        if control:
            spelt = tokenizer.convert_ids_to_tokens(sorted(control))
            raise DataError(f"{place}: the answer spells {spelt}, which would be control tokens")
        tokens = (*prompt, *said, tokenizer.eos_token_id)
        yield Example(tokens=tokens, answer_start=len(prompt))


def _turns(place: str, row: Row, tokenizer: Any) -> Iterator[tuple[list[int], str]]:
    """(prompt token ids, answer) of each answer in the row."""
    keys = set(row)
    if keys == {"messages"}:
        messages = _messages(place, row["messages"])
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                yield _chat(place, messages[:index], tokenizer), message["content"]
    elif keys == {"prompt", "completion"}:
        if not all(isinstance(value, str) for value in row.values()):
            raise DataError(f"{place}: prompt and completion must be strings")
        yield tokenizer.encode(row["prompt"]), row["completion"]
    else:
        raise DataError(
            f"{place}: fields {sorted(keys)}; either messages or prompt and completion are needed"
        )


def _chat(place: str, messages: Sequence[Message], tokenizer: Any) -> list[int]:
    try:
        return render_chat(tokenizer, messages)
    except InvalidChat as error:
        raise DataError(f"{place}: {error}") from None


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


def collate(chosen: Sequence[Example], pad_id: int) -> TrainBatch:
    """Examples -> one batch, padded to the longest."""
    length = max(len(example.tokens) for example in chosen)
    input_ids = torch.full((len(chosen), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(chosen), length), dtype=torch.long)
    labels = torch.full((len(chosen), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(chosen):
        tokens = torch.tensor(example.tokens)
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        labels[row, example.answer_start : len(tokens)] = tokens[example.answer_start :]
    return TrainBatch(input_ids, attention_mask, labels)


def pad_id(tokenizer: Any) -> int:
    """Padding is masked out, so any token serves where the tokenizer names none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class Batches:
    """Endless batches, epoch after epoch, each of examples of similar length.

    An epoch is shuffled, cut into stretches of 32 batches, and only these are sorted by length:
    little padding, and still a new mixture each time. An epoch's order is a function of the seed
    and its number, so the cursor says all that a run needs to go on where it stopped.
    """

    def __init__(self, data: Sequence[Example], size: int, pad: int, seed: int) -> None:
        self._data, self._size, self._pad, self._seed = data, min(size, len(data)), pad, seed
        self._epoch, self._next = 0, 0
        self._groups = self._order()

    @property
    def cursor(self) -> tuple[int, int]:
        """(epoch, batches of it that have been given out)."""
        return self._epoch, self._next

    @cursor.setter
    def cursor(self, cursor: tuple[int, int]) -> None:
        self._epoch, self._next = cursor
        self._groups = self._order()

    def __iter__(self) -> Iterator[TrainBatch]:
        return self

    def __next__(self) -> TrainBatch:
        if self._next == len(self._groups):
            self.cursor = (self._epoch + 1, 0)
        group = self._groups[self._next]
        self._next += 1
        return collate([self._data[i] for i in group], self._pad)

    def _order(self) -> list[list[int]]:
        chance = random.Random(f"{self._seed} {self._epoch}")
        data, size = self._data, self._size
        order = chance.sample(range(len(data)), len(data))
        groups = []
        for start in range(0, len(order), 32 * size):
            stretch = sorted(order[start : start + 32 * size], key=lambda i: len(data[i].tokens))
            groups += [stretch[i : i + size] for i in range(0, len(stretch), size)]
        chance.shuffle(groups)
        return groups
