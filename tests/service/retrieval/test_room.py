"""What collections take of their tenants' bytes: with adapters and files, and given back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog import Catalog
from adapters.errors import QuotaReached
from adapters.tables import collections as rows
from service.access.keys import Keys
from service.access.quotas import Quotas, Tenants
from service.retrieval.library import Library
from service.retrieval.passage import Document
from service.retrieval.room import Rooms
from tests.adapters.test_manifest import MANIFEST
from tests.service.retrieval.conftest import WordEmbedder, add, make_chunker

HERE = "the test"
LONG = "The cat sleeps all day and wakes at night. " * 100


@pytest.fixture
def catalog(tmp_path: Path, empty_catalog: Path) -> Iterator[Catalog]:
    catalog = Catalog(str(shutil.copy(empty_catalog, tmp_path)))
    for tenant in ("acme", "zeta"):
        Keys(catalog).create("a key", tenant, ["rag"])
    yield catalog
    catalog.close()


@pytest.fixture
def library(tmp_path: Path, catalog: Catalog) -> Library:
    return opened(tmp_path, catalog)


def opened(tmp_path: Path, catalog: Catalog, embedder: WordEmbedder | None = None) -> Library:
    rooms = Rooms(catalog, HERE)
    url = (tmp_path / "collections").as_uri()
    return Library(url, embedder or WordEmbedder(), make_chunker(), rooms)


def counted(catalog: Catalog) -> dict[tuple[str, str], int]:
    with catalog.reading() as connection:
        found = connection.execute(sa.select(rows.c.tenant, rows.c.name, rows.c.nbytes))
        return {(tenant, name): nbytes for tenant, name, nbytes in found}


def test_documents_count_and_a_deletion_gives_back(library: Library, catalog: Catalog) -> None:
    Tenants(catalog).set_quotas("acme", Quotas(bytes=30_000))
    shelf = library.shelf("acme")
    notes = shelf.create("notes")
    empty = notes.nbytes()
    assert empty < 2000
    assert counted(catalog) == {("acme", "notes"): empty}
    add(library, "notes", Document("a", LONG, {}), tenant="acme")
    one = notes.nbytes()
    assert counted(catalog) == {("acme", "notes"): one}
    assert one > 64 * 4 * notes.count()[1]
    asked = library.embedder.asked  # type: ignore[attr-defined]
    with pytest.raises(QuotaReached, match=rf"keep 30000 bytes .* has {one}: \d+ more"):
        add(library, "notes", Document("b", LONG * 8, {}), tenant="acme")
    assert library.embedder.asked == asked  # type: ignore[attr-defined]  # refused before the cost
    assert list(notes.stored()) == ["a"]
    assert counted(catalog) == {("acme", "notes"): one}
    draft = replace(MANIFEST, version=0, weights_bytes=30_000 - one + 1)
    with pytest.raises(QuotaReached, match=f"has {one}"):
        catalog.of("acme").add(draft)
    add(library, "notes", Document("a", "short", {}), tenant="acme")
    assert counted(catalog)["acme", "notes"] < one
    notes.remove(["a"])
    assert counted(catalog) == {("acme", "notes"): notes.nbytes()}
    assert notes.nbytes() < 2000
    with pytest.raises(QuotaReached):
        catalog.of("acme").add(replace(draft, weights_bytes=30_000))
    catalog.of("acme").add(draft)
    shelf.delete("notes")
    assert counted(catalog) == {}


def test_another_tenant_s_are_not_counted(library: Library, catalog: Catalog) -> None:
    Tenants(catalog).set_quotas("acme", Quotas(bytes=1000))
    library.shelf("zeta").create("notes")
    mine = library.shelf("acme").create("notes")
    add(library, "notes", Document("a", LONG, {}), tenant="zeta")
    with pytest.raises(QuotaReached, match=f"has {mine.nbytes()}:"):
        add(library, "notes", Document("a", LONG, {}), tenant="acme")


class Broken(WordEmbedder):
    def embed(self, texts):  # type: ignore[no-untyped-def]
        if len(texts) > 1:
            raise ConnectionError
        return super().embed(texts)


def test_what_fails_gives_back(tmp_path: Path, catalog: Catalog) -> None:
    library = opened(tmp_path, catalog, Broken())
    notes = library.shelf("acme").create("notes")
    with pytest.raises(ConnectionError):
        add(library, "notes", Document("a", LONG, {}), tenant="acme")
    assert counted(catalog) == {("acme", "notes"): notes.nbytes()}
    assert notes.nbytes() < 2000


def test_rows_follow_what_is_there(tmp_path: Path, library: Library, catalog: Catalog) -> None:
    """After a crash, after files were taken away by hand, and where there were no rows before."""
    library.shelf("acme").create("notes")
    add(library, "notes", Document("a", LONG, {}), tenant="acme")
    right = counted(catalog)
    with catalog.writing() as connection:
        connection.execute(sa.delete(rows))
        gone = {"tenant": "acme", "name": "gone", "nbytes": 7}
        places = (Rooms(catalog, HERE)._place, "0" * 64)
        connection.execute(sa.insert(rows), [{**gone, "place": place} for place in places])
    opened(tmp_path, catalog).recount()
    assert counted(catalog) == {**right, ("acme", "gone"): 7}  # another place's is not ours to drop
    with catalog.writing() as connection:  # reserved by a process that was killed
        connection.execute(sa.update(rows).where(rows.c.name == "notes").values(nbytes=10**9))
    opened(tmp_path, catalog).shelf("acme").collection("notes")
    assert counted(catalog) == {**right, ("acme", "gone"): 7}
