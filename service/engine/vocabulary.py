"""What the tokens of a sequence are called: by the base's tokenizer, or by its adapter's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A tokenizer of transformers, and the ids that have no text in an output. No torch here."""

    tokenizer: Any
    special: frozenset[int]

    @classmethod
    def of_base(cls, tokenizer: Any, ends: frozenset[int]) -> Vocabulary:
        return cls(tokenizer, frozenset(tokenizer.all_special_ids) | ends)
