"""Task: an endless supply of questions with one right answer each."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test"]
TEST_PART = 5  # one question in five belongs to the test split
STALE = 20  # draws without a new item, for each that was found, before a task has no more


@dataclass(frozen=True, slots=True)
class Item:
    """What the user says and the only right answer; without a question the answer is a document.

    `choices` are the labels that the answer is one of, where it is one; `passage` is what would
    have to be known for it, in words.
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    passage: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]

    @property
    def row(self) -> dict[str, Any]:
        """As a row of training data."""
        return {"messages": self.messages} if self.question else {"text": self.answer}

    @property
    def split(self) -> Split:
        """Decided by the question alone, so no question is ever in both."""
        digest = hashlib.sha256((self.question or self.answer).encode()).digest()
        return "test" if digest[0] % TEST_PART == 0 else "train"


@dataclass(frozen=True, slots=True)
class Task:
    """`make` draws one item; `about` says what the rule is, for people.

    `passages` are what retrieval can find, where the task comes with a text to look things up in.
    """

    name: str
    title: str
    about: str
    make: Callable[[random.Random], Item]
    passages: tuple[str, ...] = ()

    def items(self, split: Split, count: int, seed: int = 0) -> list[Item]:
        """`count` different items of the split. Raises ValueError where it has not so many."""
        return list(self._draw(split, count, seed))

    def _draw(self, split: Split, count: int, seed: int) -> Iterator[Item]:
        chance = random.Random(f"{self.name} {split} {seed}")
        seen: set[str] = set()
        stale = 0
        while len(seen) < count:
            item = self.make(chance)
            key = item.question or item.answer
            stale += 1
            if item.split == split and key not in seen:
                seen.add(key)
                stale = 0
                yield item
            if stale > STALE * (len(seen) + 50):
                raise ValueError(
                    f"{self.name}: {len(seen)} items of {split} were found, not {count}"
                )
