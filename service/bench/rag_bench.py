"""Ingest and queries of a collection on this machine: seconds, p50 and p99, memory. No server.

Ingest is the whole way: cut, embed with the embedding model, commit, index. For queries the
collections of each size have random vectors of length 1, so that only the store is measured; what
embedding a question costs is told beside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from base.mini import MINI, words
from base.mini.names import pool
from service.retrieval.chunks import Chunker
from service.retrieval.collection import Collection, Prepared
from service.retrieval.embedding import Embedder, open_embedder
from service.retrieval.ingest import Added, ingest
from service.retrieval.library import Library
from service.retrieval.passage import Chunk, Document
from service.retrieval.search import Mode, Question, search

if TYPE_CHECKING:
    from rich.progress import Progress

MODES: tuple[Mode, ...] = ("dense", "lexical", "hybrid")
SENTENCES = 3  # of a chunk: about 75 tokens of the embedded base
CHUNKS = 10  # of a document
COMMIT = 2500  # chunks
K = 5


def run(sizes: Sequence[int], ingested: int, queries: int, progress: Progress) -> dict[str, Any]:
    """Everything, in a directory that is gone afterwards."""
    embedder = open_embedder("minilm")
    with tempfile.TemporaryDirectory(prefix="nibble-rag-") as place:
        library = Library(Path(place).as_uri(), embedder, _chunker())
        started = _memory()
        embedder.embed(["The first question loads the model."])
        found: dict[str, Any] = {"rss": {"start": started, "with the model": _memory()}}
        if ingested:
            found["ingest"] = _ingest(library, ingested, progress)
        found["queries"] = [_queries(library, size, queries, progress) for size in sizes]
        found["embed_question"] = _spread(_embedding(embedder, queries))
        return found


def rows(found: dict[str, Any]) -> tuple[Sequence[str], list[Sequence[object]]]:
    """What was found, as a table."""
    shown: list[Sequence[object]] = []
    if one := found.get("ingest"):
        rate = f"{one['chunks'] / one['seconds']:.1f} chunks/s"
        shown.append(("ingest", one["chunks"], f"{one['seconds']:.1f} s", rate, _mib(one["rss"])))
    for size in found["queries"]:
        for mode in MODES:
            p50, p99 = size[mode]["p50"], size[mode]["p99"]
            shown.append(
                (
                    mode,
                    size["chunks"],
                    f"{1e3 * p50:.1f} ms",
                    f"{1e3 * p99:.1f} ms",
                    _mib(size["rss"]),
                )
            )
    question = found["embed_question"]
    p50, p99 = question["p50"], question["p99"]
    shown.append(("embed a question", 1, f"{1e3 * p50:.1f} ms", f"{1e3 * p99:.1f} ms", ""))
    return ("what", "chunks", "time or p50", "rate or p99", "RSS"), shown


def _ingest(library: Library, chunks: int, progress: Progress) -> dict[str, Any]:
    collection = library.shelf("bench").create("ingest", chunk_tokens=96)
    task = progress.add_task("ingest", total=chunks)
    documents = (_document(number) for number in range(chunks // CHUNKS))
    started, done = time.perf_counter(), 0
    for event in ingest(collection, documents, library.chunker, library.embedder):
        if isinstance(event, Added):
            done += event.chunks
            progress.update(task, completed=done)
    seconds = time.perf_counter() - started
    tokens = sum(passage.tokens for passage in collection.passages("d0"))
    return {
        "chunks": done,
        "seconds": round(seconds, 2),
        "tokens_of_a_document": tokens,
        "rss": _memory(),
    }


def _queries(library: Library, size: int, queries: int, progress: Progress) -> dict[str, Any]:
    collection = library.shelf("bench").create(f"of-{size}", chunk_tokens=96)
    task = progress.add_task(f"{size} chunks", total=size + queries * len(MODES))
    _fill(collection, size, lambda done: progress.update(task, completed=done))
    found: dict[str, Any] = {"chunks": size}
    for mode in MODES:
        seconds = []
        for number in range(queries + 5):
            question = Question(_question(number, size), K, mode)
            vector = _RandomEmbedder(number)
            started = time.perf_counter()
            search(collection, question, vector)
            seconds.append(time.perf_counter() - started)
            progress.advance(task)
        found[mode] = _spread(seconds[5:])
    return found | {"rss": _memory()}


def _fill(collection: Collection, size: int, told: Any) -> None:
    import numpy as np

    rng = np.random.default_rng(7)
    for start in range(0, size, COMMIT):
        prepared = []
        for number in range(start, min(start + COMMIT, size)):
            text = _sentences(number)
            vector = rng.standard_normal((1, collection.character.dimensions)).astype(np.float32)
            vector /= np.linalg.norm(vector)
            chunk = Chunk(text, 0, len(text), (), 60)
            prepared.append(Prepared(Document(f"d{number}", text), [chunk], vector))
        collection.put(prepared)
        told(start + len(prepared))
    collection.settle()


class _RandomEmbedder:
    """The vector of nothing: the store's work does not depend on what it means."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def embed(self, texts: Sequence[str]) -> Any:
        import numpy as np

        rows = np.random.default_rng(self._seed).standard_normal((len(texts), 384))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _embedding(embedder: Embedder, queries: int) -> list[float]:
    seconds = []
    for number in range(min(queries, 100)):
        started = time.perf_counter()
        embedder.embed([f"{_question(number, 1000)} {number}"])
        seconds.append(time.perf_counter() - started)
    return seconds[3:]


def _document(number: int) -> Document:
    paragraphs = (_sentences(CHUNKS * number + i) for i in range(CHUNKS))
    return Document(f"d{number}", "\n\n".join(paragraphs))


def _sentences(number: int) -> str:
    rng = Random(number)
    people, places = pool("person", "train"), pool("place", "train")
    return " ".join(
        f"{rng.choice(people)} of {rng.choice(places)} keeps a {rng.choice(words.ANIMALS)} and a "
        f"{rng.choice(words.OBJECTS)} since {rng.randrange(1700, 2020)}."
        for _ in range(SENTENCES)
    )


def _question(number: int, size: int) -> str:
    """Words of one of the chunks: a name, a place and an animal of its first sentence."""
    told = _sentences(number * 7919 % size).split()
    return f"What does {told[0]} of {told[2]} keep, a {told[5]}?"


def _chunker() -> Chunker:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MINI / "tokenizer.json"))
    return Chunker(SimpleNamespace(backend_tokenizer=tokenizer))


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "p50": round(ordered[round(0.5 * last)], 6),
        "p99": round(ordered[round(0.99 * last)], 6),
    }


def _memory() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
