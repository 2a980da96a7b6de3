"""Held-out items: questions whose names and combinations the training never shows."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from base.mini import facts, python_docs, stories, tasks
from base.mini.dialogue import Document, chat, running_text
from base.mini.names import Names

SIZES = (1, 2, 4, 6, 8, 10)


@dataclass(frozen=True)
class ContextItem:
    """A single-turn conversation, with the number of facts and passages in its prompt."""

    document: Document
    facts: int
    passages: int


def _asked(rng: Random, size: int, unknown: float) -> ContextItem:
    names = Names(rng, "held_out")
    known = facts.knowledge(rng, names, size, 1.0)
    turn = facts.ask(rng, names, known, 1, unknown)[0]
    shown = facts.context(rng, known.passages)
    document = chat([facts.first_question(rng, shown, turn)], rng.choice(facts.SYSTEMS))
    return ContextItem(document, size, len(known.passages))


def context_items(seed: int, count: int) -> list[ContextItem]:
    """`count` questions for every number of facts; the passages hold the answer."""
    return [
        _asked(Random(f"{seed}/held out/{size}/{i}"), size, 0.0)
        for size in SIZES
        for i in range(count)
    ]


def unknown_items(seed: int, count: int) -> list[Document]:
    """Questions on two to ten facts whose answer the passages lack."""
    return [
        _asked(Random(f"{seed}/held out/unknown/{i}"), 2 + i % 9, 1.0).document
        for i in range(count)
    ]


def task_items(seed: int, count: int) -> dict[str, list[Document]]:
    """`count` single-turn items of every instruction task, at full difficulty."""
    return {
        name: [
            chat([task(Random(f"{seed}/held out/{name}/{i}"), "held_out", 1.0)])
            for i in range(count)
        ]
        for name, (task, _) in tasks.TASKS.items()
    }


def texts(seed: int, count: int) -> dict[str, list[Document]]:
    """Running text of every source."""
    rng = Random(f"{seed}/held out/text")
    found = {
        name: [running_text(text(rng, "held_out")) for _ in range(count)]
        for name, (text, _) in stories.TEXTS.items()
    }
    paragraphs = python_docs.paragraphs("held_out")
    found["python"] = [running_text(p) for p in rng.sample(paragraphs, min(count, len(paragraphs)))]
    return found
