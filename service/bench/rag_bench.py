"""Ingest and queries of a collection on this machine: seconds, p50 and p99, memory. No server.

Ingest is the whole way: cut, embed with the embedding model, commit, index. For queries the
collections of each size have random vectors of length 1, so that only the store is measured; what
embedding a question costs is told beside it.

Where the collections are kept, a run that was stopped goes on with them: documents that are there
are not embedded again, and the seconds of all runs are added up.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from base.mini import MINI, words
from base.mini.names import pool
from service.retrieval.chunks import Chunker
from service.retrieval.collection import Collection, Prepared
from service.retrieval.embedding import Embedder, open_embedder
from service.retrieval.ingest import Added, Embedding, ingest
from service.retrieval.library import Library, Shelf
from service.retrieval.passage import Chunk, Document
from service.retrieval.search import Mode, Question, search

if TYPE_CHECKING:
    from rich.progress import Progress

MODES: tuple[Mode, ...] = ("dense", "lexical", "hybrid")
SENTENCES = 3  # of a chunk: about 75 tokens of the embedded base
CHUNKS = 10  # of a document
COMMIT = 2500  # chunks
CHUNK_TOKENS = 96  # at most
K = 5
WARM = 5  # questions that are not counted


def run(
    sizes: Sequence[int],
    ingested: int,
    queries: int,
    progress: Progress,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Everything, in the directory `keep`, or in one that is gone afterwards."""
    embedder = open_embedder("minilm")
    with _directory(keep) as place:
        library = Library(place.as_uri(), embedder, _chunker())
        started = _memory()
        embedder.embed(["The first question loads the model."])
        found: dict[str, Any] = {"rss": {"start": started, "with the model": _memory()}}
        if ingested:
            found["ingest"] = _ingest(library, ingested, progress, place / "ingest.json")
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


@contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="nibble-rag-") as place:
        yield Path(place)


def _opened(shelf: Shelf, name: str) -> Collection:
    if name in shelf.names():
        return shelf.collection(name)
    return shelf.create(name, chunk_tokens=CHUNK_TOKENS)


def _ingest(library: Library, chunks: int, progress: Progress, clock: Path) -> dict[str, Any]:
    """`clock` keeps the seconds of the runs so far, and of how many chunks they were: a commit
    that a kill parted from its line there is in the collection and in no figure."""
    collection = _opened(library.shelf("bench"), f"ingest-{chunks}")
    known = json.loads(clock.read_text()).get(str(chunks), {}) if clock.exists() else {}
    seconds, done = known.get("seconds", 0.0), known.get("chunks", 0)
    task = progress.add_task("ingest", total=chunks, completed=done)
    there = collection.count()[0]  # commits hold whole documents, in their order
    documents = (_document(number) for number in range(there, chunks // CHUNKS))
    started = time.perf_counter()
    for event in ingest(collection, documents, library.chunker, library.embedder):
        if isinstance(event, Embedding):
            progress.update(task, completed=done + event.chunks)
        if isinstance(event, Added):
            done += event.chunks
            passed = seconds + time.perf_counter() - started
            _note(clock, str(chunks), {"seconds": passed, "chunks": done})
            progress.update(task, completed=done)
    seconds += time.perf_counter() - started  # the index at the end among them
    _note(clock, str(chunks), {"seconds": seconds, "chunks": done})
    tokens = sum(passage.tokens for passage in collection.passages("d0"))
    return {
        "chunks": done,
        "seconds": round(seconds, 2),
        "tokens_of_a_document": tokens,
        "rss": _memory(),
    }


def _note(clock: Path, name: str, said: dict[str, float]) -> None:
    found = json.loads(clock.read_text()) if clock.exists() else {}
    fresh = clock.with_suffix(".new")
    fresh.write_text(json.dumps(found | {name: said}), encoding="utf-8")
    fresh.replace(clock)


def _queries(library: Library, size: int, queries: int, progress: Progress) -> dict[str, Any]:
    collection = _opened(library.shelf("bench"), f"of-{size}")
    task = progress.add_task(f"{size} chunks", total=size + (queries + WARM) * len(MODES))
    _fill(collection, size, lambda done: progress.update(task, completed=done))
    found: dict[str, Any] = {"chunks": size}
    for mode in MODES:
        seconds = []
        for number in range(queries + WARM):
            question = Question(_question(number, size), K, mode)
            vector = _RandomEmbedder(number)
            started = time.perf_counter()
            search(collection, question, vector)
            seconds.append(time.perf_counter() - started)
            progress.advance(task)
        found[mode] = _spread(seconds[WARM:])
    return found | {"rss": _memory()}


def _fill(collection: Collection, size: int, told: Any) -> None:
    import numpy as np

    there = collection.count()[0]
    told(there)
    for start in range(there, size, COMMIT):
        rng = np.random.default_rng((7, start))
        prepared = []
        for number in range(start, min(start + COMMIT, size)):
            text = _sentences(number)
            vector = rng.standard_normal((1, collection.character.dimensions)).astype(np.float32)
            vector /= np.linalg.norm(vector)
            chunk = Chunk(text, 0, len(text), (), 60)
            prepared.append(Prepared(Document(f"d{number}", text), [chunk], vector))
        collection.put(prepared)
        told(start + len(prepared))
    if there < size:
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
