"""Documents into a collection: cut, embed what is new, commit; told as it goes.

A commit holds whole documents only. What an `Added` event names is on the disk and is found by the
next search; what no event named is not there at all, so after a crash the same batch can be sent
again: documents that are there already are `Unchanged`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.retrieval.chunks import Chunker
from service.retrieval.collection import Collection, Prepared
from service.retrieval.embedding import Embedder
from service.retrieval.errors import DocumentRefused
from service.retrieval.passage import Chunk, Document, key_of

if TYPE_CHECKING:
    from service.retrieval.embedding import Vectors

COMMIT_DOCUMENTS = 64
COMMIT_CHUNKS = 512
EMBED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Added:
    """These documents are durable; `chunks` of them, `reused` of which had known vectors."""

    documents: tuple[str, ...]
    chunks: int
    reused: int


@dataclass(frozen=True, slots=True)
class Unchanged:
    """This document is there already, exactly so."""

    document: str


@dataclass(frozen=True, slots=True)
class Refused:
    """This document cannot be taken; others are."""

    document: str
    reason: str


@dataclass(frozen=True, slots=True)
class Embedding:
    """How far the commit in the making is."""

    chunks: int
    of: int


Event = Added | Unchanged | Refused | Embedding


def ingest(
    collection: Collection,
    documents: Iterable[Document | DocumentRefused],
    chunker: Chunker,
    embedder: Embedder,
) -> Generator[Event, None, None]:
    """Take documents one after the other; a later one of the same id replaces an earlier one.

    Runs as it is iterated; whoever stops iterating keeps what was `Added`, and has to `close` it.
    Raises EmbedderFailed, CollectionUnavailable, QuotaReached.
    """
    work = _Ingest(collection, chunker, embedder)
    try:
        for document in documents:
            if isinstance(document, DocumentRefused):
                yield Refused(document.document, document.reason)
                continue
            if work.must_commit(document):
                yield from work.commit()
            yield from work.take(document)
        yield from work.commit()
    finally:
        if work.wrote:
            collection.settle()


class _Ingest:
    """The commit in the making."""

    def __init__(self, collection: Collection, chunker: Chunker, embedder: Embedder) -> None:
        self.wrote = False
        self._collection = collection
        self._chunker = chunker
        self._embedder = embedder
        self._waiting: dict[str, tuple[Document, list[Chunk]]] = {}
        self._chunks = 0

    def must_commit(self, document: Document) -> bool:
        full = len(self._waiting) >= COMMIT_DOCUMENTS or self._chunks >= COMMIT_CHUNKS
        return full or document.id in self._waiting

    def take(self, document: Document) -> Iterator[Event]:
        character = self._collection.character
        try:
            chunks = self._chunker.cut(document, character.chunk_tokens, character.chunk_overlap)
        except DocumentRefused as error:
            yield Refused(error.document, error.reason)
            return
        self._waiting[document.id] = (document, chunks)
        self._chunks += len(chunks)

    def commit(self) -> Iterator[Event]:
        stored = self._collection.stored(list(self._waiting))
        changed: list[tuple[Document, list[Chunk]]] = []
        for document, chunks in self._waiting.values():
            found = stored.get(document.id)
            if found is not None and found.digest == document.digest:
                yield Unchanged(document.id)
            else:
                changed.append((document, chunks))
        self._waiting.clear()
        self._chunks = 0
        if changed:
            with self._collection.reserved(one for _, chunks in changed for one in chunks):
                yield from self._write(changed)

    def _write(self, changed: Sequence[tuple[Document, list[Chunk]]]) -> Iterator[Event]:
        texts = {key_of(c.sought): c.sought for _, chunks in changed for c in chunks}
        vectors = self._collection.known(texts)
        reused = sum(key_of(c.sought) in vectors for _, chunks in changed for c in chunks)
        new = [key for key in texts if key not in vectors]
        for start in range(0, len(new), EMBED_AT_ONCE):
            some = new[start : start + EMBED_AT_ONCE]
            rows = self._embedder.embed([texts[key] for key in some])
            vectors |= dict(zip(some, rows, strict=True))
            yield Embedding(start + len(some), len(new))
        prepared = [
            Prepared(document, chunks, _stacked(vectors, chunks)) for document, chunks in changed
        ]
        self._collection.put(prepared)
        self.wrote = True
        ids = tuple(document.id for document, _ in changed)
        yield Added(ids, sum(len(chunks) for _, chunks in changed), reused)


def _stacked(vectors: dict[str, Vectors], chunks: Sequence[Chunk]) -> Vectors:
    import numpy as np

    return np.stack([vectors[key_of(chunk.sought)] for chunk in chunks])
