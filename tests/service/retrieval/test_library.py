"""Names, identities and tenants: what a collection remembers, and who can see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.retrieval.errors import CollectionExists, CollectionNotFound, EmbedderDiffers
from service.retrieval.fields import parse_filter
from service.retrieval.library import Library
from service.retrieval.passage import Document
from service.retrieval.search import Question, search
from tests.service.retrieval.conftest import WordEmbedder, add, make_library


def test_a_collection_remembers_what_it_is(tmp_path: Path) -> None:
    shelf = make_library(tmp_path).shelf("default")
    made = shelf.create(
        "docs", fields={"year": "integer"}, description="a shelf", chunk_tokens=64, chunk_overlap=8
    )
    again = make_library(tmp_path).shelf("default").collection("docs")
    assert again.character == made.character
    assert again.character.embedder == "words"
    assert again.character.dimensions == 64


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", "a.b", "x" * 65, "-a", "a\n", "é"])
def test_names_are_plain(library: Library, name: str) -> None:
    with pytest.raises(InvalidRequest):
        library.shelf("default").create(name)
    with pytest.raises(CollectionNotFound):
        library.shelf("default").collection(name)


def test_a_name_is_taken_once(library: Library) -> None:
    shelf = library.shelf("default")
    shelf.create("docs")
    with pytest.raises(CollectionExists):
        shelf.create("docs")
    shelf.delete("docs")
    with pytest.raises(CollectionNotFound):
        shelf.delete("docs")
    shelf.create("docs")
    assert shelf.names() == ["docs"]


def test_more_collections_than_a_page_are_all_listed(library: Library) -> None:
    shelf = library.shelf("default")
    database = shelf._connected()
    import pyarrow as pa

    for number in range(203):
        database.create_table(f"c{number}", schema=pa.schema([("x", pa.int8())]))
    assert len(shelf.names()) == 203


@pytest.mark.parametrize(
    "given", [{"language": "Klingon"}, {"chunk_tokens": 32, "chunk_overlap": 16}]
)
def test_settings_that_cannot_be_are_refused(library: Library, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        library.shelf("default").create("docs", **given)
    assert library.shelf("default").names() == []


def test_vectors_of_two_models_never_meet(tmp_path: Path) -> None:
    library = make_library(tmp_path)
    library.shelf("default").create("docs")
    add(library, "docs", Document("a", "one word"))
    shelf = make_library(tmp_path, WordEmbedder("others")).shelf("default")
    with pytest.raises(EmbedderDiffers, match=r"'docs' are of words, and others embeds here"):
        shelf.writable("docs")
    assert shelf.collection("docs").lexical("word", 1, None), "words need no model"


# Tenants -----------------------------------------------------------------------------------------

TENANTS = ("default", "acme", "acme2")


def canary(tenant: str) -> str:
    return f"The canary of {tenant} sings kwyjibo{tenant}."


@pytest.fixture
def tenants(tmp_path: Path) -> Library:
    """Three tenants with collections of one name, each with its own canary."""
    library = make_library(tmp_path / "collections")
    for tenant in TENANTS:
        library.shelf(tenant).create("docs", fields={"tenant": "string"})
        document = Document("canary.md", canary(tenant), {"tenant": tenant})
        add(library, "docs", document, tenant=tenant)
    library.shelf("acme").create("private")
    return library


FILTERS: list[Any] = [
    None,
    {"tenant": "acme"},
    {"tenant": {"ne": "default"}},
    {"tenant": "x' OR '1'='1"},
    {"any": [{"tenant": {"in": list(TENANTS)}}, {"not": {"tenant": "default"}}]},
    {"document": "../acme/docs.lance/canary.md"},
    {"document": {"in": ["canary.md", "acme/canary.md"]}},
    {"not": {"document": "canary.md"}},
]


@pytest.mark.parametrize("given", FILTERS, ids=str)
@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_canaries_never_cross_whatever_the_filter(tenants: Library, given: Any, mode: Any) -> None:
    for tenant in TENANTS:
        collection = tenants.shelf(tenant).collection("docs")
        where = parse_filter(given, collection.character.fields)
        words = " ".join(f"kwyjibo{other}" for other in TENANTS)
        answer = search(collection, Question(words, 50, mode, where), tenants.embedder)
        assert {passage.text for passage in answer.passages} <= {canary(tenant)}
    assert given is not None or answer.passages


def test_names_reach_no_other_tenant(tenants: Library) -> None:
    shelf = tenants.shelf("default")
    assert shelf.names() == ["docs"]
    for name in ("private", "../acme/private", "acme/private", "..%2facme%2fprivate"):
        with pytest.raises(CollectionNotFound):
            shelf.collection(name)
        with pytest.raises(CollectionNotFound):
            shelf.delete(name)
    assert tenants.shelf("acme").names() == ["docs", "private"]


@pytest.mark.parametrize("tenant", ["", "..", "a/b", "A", "x" * 65, "acme\0"])
def test_a_tenant_is_a_plain_name(library: Library, tenant: str) -> None:
    with pytest.raises(ValueError, match="no tenant"):
        library.shelf(tenant)


def test_deleting_touches_no_other_tenant(tenants: Library) -> None:
    tenants.shelf("acme").collection("docs").remove(["canary.md"])
    tenants.shelf("acme2").delete("docs")
    assert tenants.shelf("default").collection("docs").count() == (1, 1)


# Starts ------------------------------------------------------------------------------------------


def test_nothing_is_imported_where_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(module: str) -> Any:
        raise AssertionError(f"{module} was imported")

    monkeypatch.setattr("service.retrieval.library.installed", never)
    embedder = WordEmbedder()
    library = make_library(tmp_path, embedder)
    assert library.shelf("default").names() == []
    assert not library.warm()
    assert embedder.asked == 0


def test_what_the_first_question_waits_for_is_there_after_a_start(tmp_path: Path) -> None:
    make_library(tmp_path).shelf("default").create("docs")
    embedder = WordEmbedder()
    library = make_library(tmp_path, embedder)
    assert library.warm()
    assert embedder.asked == 1
    assert library.shelf("default")._database is not None
