"""What a collection returns, and that what it gave up is gone from the disk."""

from __future__ import annotations

import threading
from datetime import date
from pathlib import Path

import pytest

from service.retrieval.collection import Collection
from service.retrieval.errors import DocumentNotFound
from service.retrieval.fields import parse_filter
from service.retrieval.ingest import ingest
from service.retrieval.library import Library
from service.retrieval.passage import Document
from tests.service.retrieval.conftest import add, make_library

CATS = "# Cats\n\nA cat sleeps all day. It wakes when it hears a mouse."
DOGS = "# Dogs\n\nA dog barks at night. It sleeps when everybody is home."


def files_with(place: Path, word: str) -> list[str]:
    """The files below `place` that hold a word, whatever its case."""
    wanted = word.lower().encode()
    return [f.name for f in place.rglob("*") if f.is_file() and wanted in f.read_bytes().lower()]


@pytest.fixture
def animals(library: Library) -> Collection:
    fields = {"year": "integer", "when": "date", "kind": "string", "wild": "boolean"}
    collection = library.shelf("default").create("animals", fields=fields, chunk_tokens=24)
    cat = {"year": 2020, "when": date(2020, 1, 2), "kind": "it's", "wild": False}
    add(
        library,
        "animals",
        Document("cats.md", CATS, cat),
        Document("dogs.md", DOGS, {"year": 2024}),
    )
    return collection


def test_documents_are_counted_listed_and_shown(animals: Collection) -> None:
    documents, chunks = animals.count()
    assert documents == 2
    stored = animals.stored()
    assert list(stored) == ["cats.md", "dogs.md"]
    assert chunks == sum(one.chunks for one in stored.values())
    assert stored["cats.md"].characters == len(CATS)
    assert stored["cats.md"].metadata["when"] == date(2020, 1, 2)
    assert stored["dogs.md"].metadata == {"year": 2024}
    shown = animals.passages("cats.md")
    assert [one.number for one in shown] == list(range(len(shown)))
    assert all(CATS[one.start : one.stop] == one.text for one in shown)
    assert {one.heading for one in shown} == {"Cats"}
    with pytest.raises(DocumentNotFound):
        animals.passages("cows.md")


def shelved(library: Library, count: int) -> tuple[Collection, list[bytes]]:
    """A collection of one-chunk documents `0`, `1`, …, and the bytes of their vectors."""
    collection = library.shelf("default").create("many")
    texts = [f"word{n} " * (n + 1) for n in range(count)]
    add(library, "many", *(Document(str(n), text, {}) for n, text in enumerate(texts)))
    return collection, [row.tobytes() for row in library.embedder.embed(texts)]


def holding(place: Path, vector: bytes) -> list[str]:
    return [f.name for f in place.rglob("*") if f.is_file() and vector in f.read_bytes()]


def test_one_of_many_documents_leaves_the_disk(library: Library, tmp_path: Path) -> None:
    """Fewer than a tenth of a file's rows: compaction alone would leave them. Texts are packed in
    the file, where no search for a word finds them; vectors are not."""
    collection, vectors = shelved(library, 40)
    before = collection.nbytes()
    assert holding(tmp_path, vectors[30])
    assert collection.remove(["30"]) == 1
    assert not holding(tmp_path, vectors[30])
    add(library, "many", Document("20", "another", {}))
    assert not holding(tmp_path, vectors[20])
    assert holding(tmp_path, vectors[7])
    assert collection.count() == (39, 39)
    assert collection.nbytes() < before - 64 * 4
    assert collection.lexical("word7", 3, None)[0].passage.document == "7"


def test_what_a_killed_deletion_left_goes_at_the_next_start(tmp_path: Path) -> None:
    collection, vectors = shelved(make_library(tmp_path), 40)
    for where in collection._keys(["30"]):
        collection._table.delete(where)
    assert holding(tmp_path, vectors[30])
    again = make_library(tmp_path).shelf("default").collection("many")
    assert again.count() == (39, 39)
    assert not holding(tmp_path, vectors[30])


def test_both_rankings_find_the_words(animals: Collection, library: Library) -> None:
    question = "Who barks at night?"
    vector = library.embedder.embed([question])[0]
    dense, lexical = animals.dense(vector, 10, None), animals.lexical(question, 10, None)
    for found in (dense, lexical):
        assert "barks" in found[0].passage.text
        scores = [one.passage.score for one in found]
        assert scores == sorted(scores, reverse=True)
    assert -1 <= dense[-1].passage.score <= dense[0].passage.score <= 1.0001


def test_a_question_is_words_never_syntax(animals: Collection) -> None:
    for hostile in ('barks" OR *:*', "sought:barks", "(barks", "+barks -dog ~2^", '"', "AND", ""):
        animals.lexical(hostile, 5, None)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"year": 2020}, {"cats.md"}),
        ({"year": {"gte": 2020}}, {"cats.md", "dogs.md"}),
        ({"year": {"gt": 2020}}, {"dogs.md"}),
        ({"kind": "it's"}, {"cats.md"}),
        ({"kind": "it's' OR 'a' = 'a"}, set()),
        ({"when": {"lt": "2021-01-01"}}, {"cats.md"}),
        ({"wild": False}, {"cats.md"}),
        ({"not": {"wild": False}}, set()),  # a comparison with what is missing never holds
        ({"document": "dogs.md"}, {"dogs.md"}),
        ({"document": {"ne": "dogs.md"}}, {"cats.md"}),
        ({"any": [{"year": {"in": [2024, 7]}}, {"kind": "it's"}]}, {"cats.md", "dogs.md"}),
        ({"all": [{"year": 2024}, {"kind": "it's"}]}, set()),
    ],
)
def test_filters_narrow_both_rankings(
    animals: Collection, library: Library, given: object, found: set[str]
) -> None:
    where = parse_filter(given, animals.character.fields)
    vector = library.embedder.embed(["sleeps"])[0]
    assert {one.passage.document for one in animals.dense(vector, 20, where)} == found
    assert {one.passage.document for one in animals.lexical("it sleeps", 20, where)} <= found


def test_a_deleted_document_leaves_the_disk(
    animals: Collection, library: Library, tmp_path: Path
) -> None:
    secret = Document("secret.txt", "The password of the vault is zanzibarquartz today.")
    add(library, "animals", secret)
    assert files_with(tmp_path, "zanzibarquartz"), "or else the search below proves nothing"
    assert animals.remove(["secret.txt", "never.txt"]) == 1
    assert not files_with(tmp_path, "zanzibar")
    assert "secret.txt" not in animals.stored()
    assert not animals.lexical("zanzibarquartz", 5, None)
    assert animals.count()[0] == 2


def test_a_replaced_text_leaves_the_disk(
    animals: Collection, library: Library, tmp_path: Path
) -> None:
    long = "The oldquartz word. " * 40
    add(library, "animals", Document("page", long))
    assert files_with(tmp_path, "oldquartz")
    before = animals.stored()["page"].chunks
    add(library, "animals", Document("page", "Only newquartz now."))
    assert before > animals.stored()["page"].chunks == 1
    assert files_with(tmp_path, "newquartz")
    assert not files_with(tmp_path, "oldquartz")


def test_a_deleted_collection_leaves_no_file(
    animals: Collection, library: Library, tmp_path: Path
) -> None:
    assert files_with(tmp_path, "barks")
    library.shelf("default").delete("animals")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_readers_see_whole_documents_while_they_are_replaced(tmp_path: Path) -> None:
    """Each text says its round in every chunk: nobody may ever see two rounds of one document."""
    library = make_library(tmp_path / "collections")
    collection = library.shelf("default").create("d", chunk_tokens=16)
    texts = [" ".join(f"round{r} word{i}." for i in range(24)) for r in range(6)]
    seen: list[set[str]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                shown = collection.stored(["page"]) and collection.passages("page")
                seen.append({w for p in shown or () for w in p.text.split() if w[:5] == "round"})
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for text in texts:
            document = Document("page", text)
            list(ingest(collection, [document], library.chunker, library.embedder))
    finally:
        done.set()
        reader.join()
    assert not errors
    assert all(len(rounds) <= 1 for rounds in seen)
    assert len(collection.passages("page")) > 3


# Many vectors ------------------------------------------------------------------------------------


def test_an_index_finds_what_comparing_all_vectors_finds(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.retrieval.collection.VECTORS_FROM", 300)
    shelf = library.shelf("default")
    collection = shelf.create("many", fields={"year": "integer"})
    documents = [Document(f"d{n}", f"word{n} and word{n // 3}", {"year": n}) for n in range(400)]
    add(library, "many", *documents[:200])
    assert indexed(collection) == 0, "so few are compared one by one"
    add(library, "many", *documents[200:])
    assert indexed(collection) == 400
    add(library, "many", Document("late", "word7 and a late one"))
    vector = library.embedder.embed(["word7 and word2"])[0]
    best = [one.passage.document for one in collection.dense(vector, 3, None)]
    assert best[0] == "d7"
    alone = parse_filter({"year": 399}, collection.character.fields)
    assert [one.passage.document for one in collection.dense(vector, 3, alone)] == ["d399"]
    collection.remove(["d7"])
    assert indexed(collection) == 400, "built anew, without the vector of what was removed"
    assert "d7" not in [one.passage.document for one in collection.dense(vector, 50, None)]
    collection.remove([f"d{n}" for n in range(200)])
    assert indexed(collection) == 0, "and dropped where few are left"
    assert len(collection.dense(vector, 500, None)) == 201


def indexed(collection: Collection) -> int:
    """Rows in the index of vectors."""
    table = collection._table
    names = [one.name for one in table.list_indices() if "vector" in one.columns]
    assert len(names) < 2
    return sum(table.index_stats(name).num_indexed_rows for name in names)
