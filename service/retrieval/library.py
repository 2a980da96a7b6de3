"""The library: for every tenant a shelf of collections, each tenant in a place of its own.

`<url>/<tenant>/<collection>.lance`. A shelf opens the tables of its own directory and knows of no
other, so no filter and no name can reach a neighbour's documents.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from adapters.manifest import DEFAULT_TENANT
from service.errors import InvalidRequest
from service.retrieval.chunks import DEFAULT_TOKENS, Chunker
from service.retrieval.collection import METADATA, Character, Collection, opening, schema
from service.retrieval.embedding import Embedder
from service.retrieval.errors import (
    CollectionExists,
    CollectionNotFound,
    CollectionUnavailable,
    EmbedderDiffers,
    installed,
)
from service.retrieval.fields import check_fields
from service.retrieval.room import Room, Rooms

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")
MAX_COLLECTIONS = 1000  # of one tenant
# The stemmers that the store's text index has.
LANGUAGES = (
    "Arabic", "Danish", "Dutch", "English", "Finnish", "French", "German", "Greek", "Hungarian",
    "Italian", "Norwegian", "Portuguese", "Romanian", "Russian", "Spanish", "Swedish", "Tamil",
    "Turkish",
)  # fmt: skip


class Library:
    """All tenants' collections, the model that embeds and the tokenizer that measures."""

    def __init__(
        self, url: str, embedder: Embedder, chunker: Chunker, rooms: Rooms | None = None
    ) -> None:
        """`url`: a file:// directory, or s3://bucket/prefix. `rooms`: where the bytes of tenants
        are counted. Nothing is opened yet."""
        self._url = url.rstrip("/")
        self._rooms = rooms
        self.embedder = embedder
        self.chunker = chunker
        self._shelves: dict[str, Shelf] = {}
        self._lock = threading.Lock()

    def shelf(self, tenant: str) -> Shelf:
        """The collections of one tenant, who was named by the server and never by a client."""
        if not NAME.match(tenant):
            raise ValueError(f"{tenant[:80]!r} is no tenant's name")
        with self._lock:
            if tenant not in self._shelves:
                place = _place(self._url, tenant)
                self._shelves[tenant] = Shelf(place, self, partial(self._room, tenant))
            return self._shelves[tenant]

    def recount(self) -> None:
        """Bring the rows of collections to what is there: those that a crash left or that were
        removed by hand go, and what has none yet is measured.

        Raises StoreUnavailable, CollectionUnavailable, NotInstalled.
        """
        if self._rooms is None:
            return
        known = self._rooms.known()
        for tenant in sorted(known.keys() | set(self._tenants())):
            shelf, counted = self.shelf(tenant), known.get(tenant, set())
            there = set(shelf.names())
            for name in sorted(counted - there):
                self._rooms.of(tenant, name).drop()
            for name in sorted(there - counted):
                shelf.collection(name)

    def _room(self, tenant: str, name: str) -> Room | None:
        return None if self._rooms is None else self._rooms.of(tenant, name)

    def warm(self) -> bool:
        """Import, open and load what the first question would wait for, where there is a
        collection; whether there was. Raises what that question would raise."""
        shelves = [self.shelf(tenant) for tenant in self._tenants()]
        if not any(shelf.names() for shelf in shelves):
            return False
        self.embedder.embed(["The first question is not to wait."])
        return True

    def _tenants(self) -> list[str]:
        """Who has a directory here; of a bucket nobody can say, so the one that always is."""
        place = Path(_place(self._url, "."))
        if "://" in self._url and not self._url.startswith("file:"):
            return [DEFAULT_TENANT]
        inside = sorted(place.iterdir()) if place.is_dir() else []
        return [one.name for one in inside if one.is_dir() and NAME.match(one.name)]


class Shelf:
    """One tenant's collections, opened when they are first asked for."""

    def __init__(
        self, place: str, library: Library, room: Callable[[str], Room | None] = lambda _: None
    ) -> None:
        """`room`: where the bytes of a collection of this name are counted."""
        self._place = place
        self._room = room
        self._local = "://" not in place
        self.library = library
        self._database: Any = None
        self._open: dict[str, Collection] = {}
        self._lock = threading.Lock()

    def create(
        self,
        name: str,
        *,
        fields: Mapping[str, str] | None = None,
        description: str = "",
        language: str = "English",
        chunk_tokens: int = DEFAULT_TOKENS,
        chunk_overlap: int = 0,
    ) -> Collection:
        """A new, empty collection for the embedding model of now.

        Raises InvalidRequest, CollectionExists, EmbedderFailed.
        """
        _check_name(name)
        checked = check_fields(fields or {})
        if language not in LANGUAGES:
            raise InvalidRequest(
                f"{language[:40]!r} is not known; known are {', '.join(LANGUAGES)}", "language"
            )
        if chunk_overlap >= chunk_tokens // 2:
            raise InvalidRequest(
                f"chunk_overlap is {chunk_overlap}; it should be less than half of chunk_tokens, "
                f"{chunk_tokens}",
                "chunk_overlap",
            )
        embedder = self.library.embedder
        character = Character(
            embedder.name,
            embedder.embed(["How wide is a vector?"]).shape[1],
            chunk_tokens,
            chunk_overlap,
            datetime.now(UTC).isoformat(timespec="seconds"),
            description,
            language,
            checked,
        )
        with self._lock:
            present = self._names()
            if name in present:
                raise CollectionExists(f"collection {name!r} exists")
            if len(present) >= MAX_COLLECTIONS:
                raise InvalidRequest(f"there are {MAX_COLLECTIONS} collections already", "name")
            told = json.dumps(character.told).encode()
            with opening():
                table = self._connected().create_table(name, schema=schema(character, told))
            self._open[name] = self._collection(table, character, name)
            self._open[name].settle()
            return self._open[name]

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._names())

    def collection(self, name: str) -> Collection:
        """Raises CollectionNotFound."""
        with self._lock:
            if name not in self._open:
                if not NAME.match(name) or name not in self._names():
                    raise CollectionNotFound(f"collection {name[:80]!r} does not exist")
                self._open[name] = self._opened(name)
            return self._open[name]

    def writable(self, name: str) -> Collection:
        """The collection, when its vectors are of the model that embeds now.

        Raises CollectionNotFound, EmbedderDiffers.
        """
        found = self.collection(name)
        check_embedder(found, self.library.embedder, name)
        return found

    def delete(self, name: str) -> None:
        """Remove a collection and its files. Raises CollectionNotFound."""
        self.collection(name)
        with self._lock:
            self._open.pop(name, None)
            with opening():
                self._connected().drop_table(name)
            if (room := self._room(name)) is not None:
                room.drop()

    def _opened(self, name: str) -> Collection:
        with opening():
            table = self._connected().open_table(name)
        told = (table.schema.metadata or {}).get(METADATA)
        if told is None:
            raise CollectionUnavailable(f"{name!r} is a table, but no collection of this program")
        character = Character(**json.loads(told))
        found = self._collection(table, character, name)
        if self._local:
            found.settle(sweep=True)  # whatever a killed process left of its last commit
        else:
            found.measure()
        return found

    def _collection(self, table: Any, character: Character, name: str) -> Collection:
        return Collection(table, character, local=self._local, room=self._room(name))

    def _names(self) -> set[str]:
        names: set[str] = set()
        if self._local and not any(Path(self._place).glob("*.lance")):
            return names  # without importing what would say the same
        token: str | None = None
        while True:
            with opening():
                page = self._connected().list_tables(page_token=token, limit=200)
            names.update(page.tables)
            token = page.page_token
            if not token:
                return names

    def _connected(self) -> Any:
        if self._database is None:
            if self._local:
                Path(self._place).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._database = installed("lancedb").connect(self._place)
        return self._database


def check_embedder(collection: Collection, embedder: Embedder, name: str) -> None:
    """Raises EmbedderDiffers where vectors of two models would meet."""
    if collection.character.embedder != embedder.name:
        raise EmbedderDiffers(
            f"the vectors of collection {name!r} are of {collection.character.embedder}, and "
            f"{embedder.name} embeds here: start the server with that model, add the documents to "
            "a new collection, or search this one with mode lexical"
        )


def _place(url: str, tenant: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return str(Path(unquote(parts.path)) / tenant)
    return f"{url}/{tenant}"


def _check_name(name: str) -> None:
    if not NAME.match(name):
        raise InvalidRequest(
            "a collection's name has small letters, digits, - and _, begins with a letter or "
            "digit, and has at most 64 characters",
            "name",
        )
