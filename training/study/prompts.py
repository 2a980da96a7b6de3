"""How an item is asked: plainly, after examples, with its gold passage, with retrieved ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from base.load import Base
from training.data import Encoding, Example, encode
from training.errors import DataError
from training.study.bm25 import Bm25
from training.study.config import Reference, TaskConfig
from training.study.material import Material
from training.tasks import Item


class Prompts:
    """Renders a task's items for the base, in the way that `reference` names."""

    def __init__(
        self, base: Base, config: TaskConfig, material: Material, reference: Reference = "zero_shot"
    ) -> None:
        self._tokenizer: Any = base.tokenizer
        limit = min(base.spec.max_positions, 1 << 20)
        self._encoding = Encoding(base.tokenizer, limit, "completion")
        self._config, self._material, self._reference = config, material, reference
        self._corpus = material.passages or [_told(item) for item in material.train]
        self._index = Bm25(self._corpus) if reference == "bm25" else None

    def example(self, item: Item, answer: str | None = None) -> Example:
        """Prompt and answer: the item's own, or another label of its choices."""
        said = item.answer if answer is None else answer
        if not item.question:
            return self._document(item, said)
        question = item.question
        lead = self._turns(item)
        if passage := self._passage(item):
            question = f"{passage}\n\n{question}"
        messages = [*lead, {"role": "user", "content": question}]
        row = {"messages": [*messages, {"role": "assistant", "content": said}]}
        return self._encoding.examples(f"task {self._config.name}", row).examples[-1]

    def _document(self, page: Item, text: str) -> Example:
        """The page's tokens but the first, which has nothing before it in the plain arm."""
        lead = {
            "zero_shot": [],
            "few_shot": [item.answer for item in self._material.train[: self._config.shots]],
            "gold_context": [page.passage],
            "bm25": [*self._found(page.passage), page.passage],
        }[self._reference]
        before = encode(self._tokenizer, "".join(f"{part}\n\n" for part in lead if part))
        tokens = (*before, *encode(self._tokenizer, text))
        if len(tokens) > self._encoding.max_length:
            raise DataError(
                f"task {self._config.name}: {len(tokens)} tokens with {self._reference}, the base "
                f"takes {self._encoding.max_length}; ask for fewer shots or passages"
            )
        return Example(tokens, len(before) + 1)

    def _turns(self, item: Item) -> list[dict[str, str]]:
        """Answered examples before the question, as turns of the chat."""
        train = self._material.train
        if self._reference == "few_shot":
            shown: Sequence[Item] = train[: self._config.shots]
        elif self._reference == "bm25" and not self._material.passages:
            # Nothing to look up but what was learnt from: the examples that are most like it.
            shown = [train[i] for i in reversed(self._top(item.question))]
        else:
            shown = ()
        return [message for one in shown for message in one.messages]

    def _passage(self, item: Item) -> str:
        if self._reference == "gold_context":
            return item.passage
        if self._reference == "bm25" and self._material.passages:
            found = self._found(item.question)
            return "\n".join(f"[{number}] {text}" for number, text in enumerate(found, start=1))
        return ""

    def _found(self, query: str) -> list[str]:
        return [self._corpus[i] for i in self._top(query)] if self._index else []

    def _top(self, query: str) -> list[int]:
        assert self._index is not None
        return self._index.top(query, self._config.passages)


def _told(item: Item) -> str:
    return f"{item.question} {item.answer}".strip()
