"""What collections take of their tenants' bytes: reserved before a commit, measured after it.

The rows are the catalog's, beside adapters and training files, which the same quota counts. A row
is never less than what is on the disk: what a killed process had reserved and not written stays in
it until its collection is opened or measured again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa
import structlog

from adapters.catalog import Catalog
from adapters.errors import AdapterError
from adapters.room import check_room
from adapters.tables import collections as rows
from adapters.tables import tenants

logger = structlog.get_logger("nibble.retrieval")


class Rooms:
    """The rows of all collections that are kept in one place."""

    def __init__(self, catalog: Catalog, where: str) -> None:
        """`where` tells this place from those of other servers over the same catalog."""
        self._catalog = catalog
        self._place = hashlib.sha256(where.encode()).hexdigest()

    def of(self, tenant: str, name: str) -> Room:
        return Room(self._catalog, tenant, self._place, name)

    def known(self) -> dict[str, set[str]]:
        """Every tenant, and its collections that have a row. Raises StoreUnavailable."""
        query = sa.select(rows.c.tenant, rows.c.name).where(rows.c.place == self._place)
        with self._catalog.reading() as connection:
            found: dict[str, set[str]] = {
                name: set() for name in connection.execute(sa.select(tenants.c.name)).scalars()
            }
            for row in connection.execute(query):
                found.setdefault(row.tenant, set()).add(row.name)
        return found


class Room:
    """The row of one collection. Thread-safe."""

    def __init__(self, catalog: Catalog, tenant: str, place: str, name: str) -> None:
        self._catalog = catalog
        self._tenant = tenant
        self._key = {"tenant": tenant, "place": place, "name": name}
        self._lock = threading.Lock()
        self._measured = 0
        self._reserved = 0  # by this process
        self._written: int | None = None

    @contextmanager
    def reserved(self, nbytes: int, measure: Callable[[], int]) -> Iterator[None]:
        """Have room for so much more until it is written and `measure` counts it.

        Raises QuotaReached, StoreUnavailable, StoreFull.
        """
        with self._lock, self._catalog.writing() as connection:
            check_room(connection, self._tenant, nbytes=nbytes)
            self._write(connection, self._measured + self._reserved + nbytes)
            self._reserved += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= nbytes
            self.settle(measure)

    def settle(self, measure: Callable[[], int]) -> None:
        """Let the row be what is there. A catalog that fails keeps what was reserved: what is
        written is written."""
        with self._lock:
            try:
                self._measured = measure()
                total = self._measured + self._reserved
                if total != self._written:
                    with self._catalog.writing() as connection:
                        self._write(connection, total)
            except Exception as error:
                reason = str(error) if isinstance(error, AdapterError) else type(error).__name__
                logger.warning("a collection was not measured", reason=reason, **self._key)

    def drop(self) -> None:
        """The collection is gone. Raises StoreUnavailable."""
        with self._lock, self._catalog.writing() as connection:
            connection.execute(sa.delete(rows).where(*self._mine()))
            self._written = None

    def _write(self, connection: sa.Connection, nbytes: int) -> None:
        change = sa.update(rows).where(*self._mine()).values(nbytes=nbytes)
        if connection.execute(change).rowcount == 0:
            connection.execute(sa.insert(rows).values(**self._key, nbytes=nbytes))
        self._written = nbytes

    def _mine(self) -> Sequence[sa.ColumnElement[bool]]:
        return [rows.c[column] == value for column, value in self._key.items()]
