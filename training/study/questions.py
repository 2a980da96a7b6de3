"""How an item is asked: plainly, after examples, through a template, with passages before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapters.prompts.quotation import SYSTEM, asked, block
from training.study.bm25 import Bm25
from training.study.config import Reference, TaskConfig
from training.study.material import Material
from training.tasks import Item

Found = Mapping[str, Sequence[str]]  # query -> the passages that a server found, in their order
Messages = list[dict[str, str]]


class Questions:
    """The chats and the lead texts of one task, in the way that `reference` names."""

    def __init__(
        self,
        config: TaskConfig,
        material: Material,
        reference: Reference = "zero_shot",
        found: Found | None = None,
    ) -> None:
        """`found` is what a server's search gave; dense and hybrid need it."""
        self._config, self._material, self._reference = config, material, reference
        self._corpus = corpus(material)
        self._index = Bm25(self._corpus) if reference == "bm25" else None
        self._served = found or {}

    def messages(self, item: Item) -> Messages:
        """The chat of an item that has a question, the user's turn last."""
        if self._reference in ("dense", "hybrid"):  # as POST /generate with `retrieval` has it
            turn = asked(block(self._found(item.question)), item.question)
            return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": turn}]
        question = item.question
        if passage := self._passage(item):
            question = f"{passage}\n\n{question}"
        return [*self._turns(item), {"role": "user", "content": question}]

    def lead(self, page: Item) -> list[str]:
        """What stands before a document."""
        found: dict[str, list[str]] = {
            "few_shot": [item.answer for item in self._material.train[: self._config.shots]],
            "gold_context": [page.passage],
        }
        if self._reference in ("bm25", "dense", "hybrid"):
            return [*self._found(page.passage), page.passage]
        return found.get(self._reference, [])

    def _turns(self, item: Item) -> Messages:
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
        if self._index is None:
            return list(self._served[query])
        return [self._corpus[i] for i in self._top(query)]

    def _top(self, query: str) -> list[int]:
        assert self._index is not None
        return self._index.top(query, self._config.passages)


def corpus(material: Material) -> list[str]:
    """What can be looked up: the task's own passages, else what was learnt from."""
    return material.passages or [
        f"{item.question} {item.answer}".strip() for item in material.train
    ]


def query_of(item: Item) -> str:
    """What is looked for."""
    return item.question or item.passage


def body_of(
    reference: str, item: Item, questions: Questions, passages: int, collection: str, template: str
) -> dict[str, Any]:
    """The request to POST /generate that asks an item as `reference` does."""
    plain = [{"role": "user", "content": item.question}]
    if reference == "template":
        return {"inputs": plain, "template": {"name": template}}
    if reference in ("dense", "hybrid"):
        found = {"collection": collection, "k": passages, "mode": reference}
        return {"inputs": plain, "retrieval": found}
    return {"inputs": questions.messages(item)}
