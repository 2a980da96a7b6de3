"""What retrieval deals in: documents that come in, passages that go out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date

Value = str | int | float | bool | date


@dataclass(frozen=True, slots=True)
class Document:
    """One document as its owner sees it. `text` may be Markdown; offsets of passages count its
    characters."""

    id: str
    text: str
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return key_of(self.id)

    @property
    def digest(self) -> str:
        """Of everything that a search could find or return."""
        told = sorted((name, str(value)) for name, value in self.metadata.items())
        return _sha256("\0".join([self.text, *(f"{name}={value}" for name, value in told)]))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Characters [start, stop) of a document, with the headings that they stand under."""

    text: str
    start: int
    stop: int
    headings: tuple[str, ...]
    tokens: int  # of the base

    @property
    def heading(self) -> str:
        return " > ".join(self.headings)

    @property
    def sought(self) -> str:
        """What search reads: the text below its headings, each of them once."""
        above = [one for one in self.headings if one not in self.text]
        return "\n".join([*above, self.text])


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk as a search found it. `score` is that of the mode; the others say how it came."""

    document: str
    number: int  # of the chunk in its document, from 0
    heading: str
    text: str
    start: int
    stop: int
    tokens: int
    score: float
    dense: float | None = None  # cosine similarity
    lexical: float | None = None  # BM25
    rerank: float | None = None
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, int]:
        """Where it stands, whatever its score: the order in which a prompt shows passages."""
        return self.document, self.number


def key_of(document: str) -> str:
    """What the store knows a document by: hex digits only, whatever its owner calls it."""
    return _sha256(document)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
