"""Ingest: whole documents, in commits that survive whatever happens to the process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.retrieval.errors import DocumentRefused
from service.retrieval.ingest import Added, Embedding, Refused, Unchanged, ingest
from service.retrieval.library import Library
from service.retrieval.passage import Document
from tests.service.retrieval.conftest import WordEmbedder, add, make_library

ROOT = Path(__file__).resolve().parents[3]
CHUNKS = 7  # of each document below


def document(number: int) -> Document:
    sentences = (f"Document {number} says number {i} of its own words." for i in range(2 * CHUNKS))
    return Document(f"d{number}", "\n\n".join(sentences))


def test_events_name_what_is_durable(library: Library) -> None:
    collection = library.shelf("default").create("docs", chunk_tokens=48)
    events = add(library, "docs", document(1), document(2))
    assert [type(event) for event in events] == [Embedding, Added]
    added = events[-1]
    assert isinstance(added, Added)
    assert added.documents == ("d1", "d2")
    assert collection.count() == (2, added.chunks)


def test_the_same_again_is_unchanged(library: Library) -> None:
    library.shelf("default").create("docs", fields={"year": "integer"})
    first = Document("a", "one two three", {"year": 1})
    add(library, "docs", first)
    assert add(library, "docs", first) == [Unchanged("a")]
    (again,) = add(library, "docs", Document("a", "one two three", {"year": 2}))
    assert again == Added(("a",), 1, 1), "new metadata, and the known vector"
    assert library.shelf("default").collection("docs").stored()["a"].metadata == {"year": 2}


def test_a_text_is_embedded_once(library: Library) -> None:
    embedder = library.embedder
    assert isinstance(embedder, WordEmbedder)
    library.shelf("default").create("docs", chunk_tokens=16)
    asked = embedder.asked
    paragraphs = [f"Paragraph {i} is here to stay." for i in range(8)]
    add(library, "docs", Document("a", "\n\n".join(paragraphs)))
    assert embedder.asked - asked == 8
    add(library, "docs", Document("a", "\n\n".join([*paragraphs, "And a new one."])))
    assert embedder.asked - asked == 9
    add(library, "docs", Document("copy", "\n\n".join(paragraphs)))
    assert embedder.asked - asked == 9


def test_a_later_document_of_the_same_id_wins(library: Library) -> None:
    collection = library.shelf("default").create("docs")
    add(library, "docs", Document("a", "first words"), Document("a", "second words"))
    assert [passage.text for passage in collection.passages("a")] == ["second words"]


def test_a_bad_document_stops_no_other(library: Library) -> None:
    collection = library.shelf("default").create("docs")
    documents = [
        Document("a", "good"),
        Document("b", " \n"),
        DocumentRefused("c", "no"),
        Document("d", "x"),
    ]
    events = list(ingest(collection, documents, library.chunker, library.embedder))
    refused = [event.document for event in events if isinstance(event, Refused)]
    assert refused == ["b", "c"]
    assert list(collection.stored()) == ["a", "d"]


def test_who_stops_listening_keeps_what_was_added(library: Library) -> None:
    collection = library.shelf("default").create("docs", chunk_tokens=48)
    documents = [document(i) for i in range(400)]
    events = ingest(collection, documents, library.chunker, library.embedder)
    for event in events:
        if isinstance(event, Added):
            break
    events.close()
    assert set(collection.stored()) == set(event.documents)


INGEST = """
import sys
from pathlib import Path
from tests.service.retrieval.conftest import make_library
from tests.service.retrieval.test_ingest import document
from service.retrieval.ingest import Added, Unchanged, ingest

library = make_library(Path(sys.argv[1]))
shelf = library.shelf("default")
collection = shelf.collection("docs") if shelf.names() else shelf.create("docs", chunk_tokens=48)
documents = (document(number) for number in range(int(sys.argv[2])))
for event in ingest(collection, documents, library.chunker, library.embedder):
    names = event.documents if isinstance(event, Added) else ()
    # Wide, so that who is not read soon waits: it is not far ahead of what was acknowledged.
    print(*(f"{name:<1000}" for name in names), sep="\\n", flush=True)
"""


@pytest.mark.parametrize("commits", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_kill_9_loses_nothing_acknowledged_and_shows_nothing_half(
    tmp_path: Path, commits: int
) -> None:
    """A real process, killed at no chosen moment of its next commit."""
    place, many = tmp_path / "collections", 2000
    process = subprocess.Popen(
        [sys.executable, "-c", INGEST, str(place), str(many)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    acknowledged: list[str] = []
    while len(acknowledged) < 64 * commits:
        line = process.stdout.readline()
        assert line, "it ended by itself"
        acknowledged += line.split()
    process.kill()
    acknowledged += process.stdout.read().split()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL

    library = make_library(place)
    collection = library.shelf("default").collection("docs")
    stored = collection.stored()
    assert set(acknowledged) <= set(stored), "an acknowledged document is gone"
    assert len(stored) < many, "it was not killed in the middle"
    chunks = {name: len(collection.passages(name)) for name in list(stored)[:: len(stored) // 20]}
    assert all(count == stored[name].chunks for name, count in chunks.items())
    assert collection.count() == (len(stored), sum(one.chunks for one in stored.values()))
    wanted = len(stored) + 5
    events = add(library, "docs", *(document(number) for number in range(wanted)))
    unchanged = {event.document for event in events if isinstance(event, Unchanged)}
    assert set(stored) == unchanged, "what was there has been taken again"
    assert len(collection.stored()) == wanted
    assert collection.lexical("Document 3 says", 5, None)
