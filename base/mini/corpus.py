"""The corpus: an endless stream of documents, fixed by a seed, a split and a difficulty."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from base.mini import facts, python_docs, stories, tasks
from base.mini.dialogue import Document, running_text
from base.mini.names import Split

SOURCES = ("facts", "tasks", "stories", "python")
EASY, HARD = (0.54, 0.36, 0.05, 0.05), (0.22, 0.72, 0.03, 0.03)


def shares(difficulty: float) -> list[float]:
    """Share of each source: answers from context lead, the many tasks follow."""
    return [e + (h - e) * difficulty for e, h in zip(EASY, HARD, strict=True)]


def document(rng: Random, split: Split, difficulty: float) -> Document:
    """One document. `difficulty` from 0 to 1 widens passages and lengthens tasks.

    Half of the documents are easier than asked, so that what was learnt early stays.
    """
    level = difficulty if rng.random() < 0.5 else difficulty * rng.random()
    source = rng.choices(SOURCES, shares(difficulty))[0]
    if source == "facts":
        return facts.document(rng, split, level)
    if source == "tasks":
        return tasks.document(rng, split, level)
    if source == "stories":
        return running_text(stories.text(rng, split))
    return running_text(rng.choice(python_docs.paragraphs(split)))


def documents(seed: str, split: Split, difficulty: float) -> Iterator[Document]:
    """Documents without end; the same arguments give the same documents."""
    rng = Random(f"{seed}/{split}")
    while True:
        yield document(rng, split, difficulty)
