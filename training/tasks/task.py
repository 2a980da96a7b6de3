"""Task: an endless supply of questions with one right answer each."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test"]
TEST_PART = 5  # one question in five belongs to the test split


@dataclass(frozen=True, slots=True)
class Item:
    """What the user says and the only right answer."""

    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]

    @property
    def row(self) -> dict[str, Any]:
        """As a row of training data."""
        return {"messages": self.messages}

    @property
    def split(self) -> Split:
        """Decided by the question alone, so no question is ever in both."""
        digest = hashlib.sha256(self.question.encode()).digest()
        return "test" if digest[0] % TEST_PART == 0 else "train"


@dataclass(frozen=True, slots=True)
class Task:
    """`make` draws one item; `about` says what the rule is, for people."""

    name: str
    title: str
    about: str
    make: Callable[[random.Random], Item]

    def items(self, split: Split, count: int, seed: int = 0) -> list[Item]:
        """`count` different items of the split."""
        return list(self._draw(split, count, seed))

    def _draw(self, split: Split, count: int, seed: int) -> Iterator[Item]:
        chance = random.Random(f"{self.name} {split} {seed}")
        seen: set[str] = set()
        while len(seen) < count:
            item = self.make(chance)
            if item.split == split and item.question not in seen:
                seen.add(item.question)
                yield item
