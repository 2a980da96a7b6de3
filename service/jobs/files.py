"""Training files on the disk: the row in the catalog is the commit, the bytes are there before it.

A file lies under its id, which the server makes; a client's name for it is kept and never a path.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from adapters.blobs import disk_errors
from adapters.catalog import Catalog
from adapters.errors import QuotaReached
from adapters.manifest import DEFAULT_TENANT
from adapters.room import check_room
from adapters.tables import training_files as files
from service.errors import NotFound

Order = Literal["asc", "desc"]
FILE_ID = re.compile(r"file-[0-9a-f]{24}")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """One file: what a client called it, its format, its bytes by their sha-256."""

    id: str
    filename: str
    purpose: str
    suffix: str
    nbytes: int
    sha256: str
    created: float  # seconds since the epoch


class TrainingFiles:
    """The files of one server, in one directory: of one tenant (`of`), or of all. Thread-safe.

    Every method raises StoreUnavailable or StoreFull when disk or catalog fail.
    """

    def __init__(self, catalog: Catalog, directory: Path, home: str) -> None:
        self._catalog = catalog
        self._directory = directory
        self._home = home
        self._tenant: str | None = None
        with disk_errors("cannot create the directory of training files"):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def of(self, tenant: str) -> TrainingFiles:
        """Those of one tenant; another's are not there."""
        found = copy(self)
        found._tenant = tenant
        return found

    def add(
        self, source: Path, *, filename: str, purpose: str, suffix: str, nbytes: int, sha256: str
    ) -> TrainingFile:
        """Keep `source`, a synced file on the same file system, which moves; durable on return.

        Raises QuotaReached.
        """
        found = TrainingFile(
            f"file-{secrets.token_hex(12)}",
            filename,
            purpose,
            suffix,
            nbytes,
            sha256,
            time.time(),
        )
        with self._catalog.writing() as connection:
            check_room(connection, self._tenant or DEFAULT_TENANT, nbytes=nbytes)
        path = self._path(found.id)
        with disk_errors("cannot keep a training file"):
            source.rename(path)
            _sync(self._directory)
        fields = {name: getattr(found, name) for name in TrainingFile.__slots__}
        fields |= {"home": self._home, "tenant": self._tenant or DEFAULT_TENANT}
        try:
            with self._catalog.writing() as connection:  # others may have come meanwhile
                check_room(connection, self._tenant or DEFAULT_TENANT, nbytes=nbytes)
                connection.execute(sa.insert(files).values(**fields))
        except QuotaReached:
            path.unlink(missing_ok=True)
            raise
        return found

    def get(self, file_id: str) -> TrainingFile:
        """Raises NotFound."""
        row = None
        if FILE_ID.fullmatch(file_id):
            query = self._mine().where(files.c.id == file_id)
            with self._catalog.reading() as connection:
                row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"file {file_id[:80]!r} does not exist", "file_id")
        return _file(row)

    def path(self, file: TrainingFile) -> Path:
        """Where its bytes are. Raises NotFound where the disk has lost them."""
        found = self._path(file.id)
        if not found.is_file():
            raise NotFound(f"the bytes of file {file.id!r} are missing on the disk", "file_id")
        return found

    def list(
        self, *, after: str | None = None, limit: int, order: Order, purpose: str | None = None
    ) -> tuple[list[TrainingFile], bool]:
        """`limit` files after the one with id `after`, and whether there are more."""
        query = self._mine()
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._catalog.reading() as connection:
            rows = connection.execute(page(query, files, after, limit, order)).all()
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str) -> None:
        """Forget a file; jobs that were made of it have their own link to it. Raises NotFound."""
        found = self.get(file_id)
        with self._catalog.writing() as connection:
            connection.execute(sa.delete(files).where(files.c.id == found.id))
        with disk_errors("cannot remove a training file"):
            self._path(found.id).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove what a crash left between bytes and row; how many. At start, before any upload."""
        with self._catalog.reading() as connection:
            known = set(connection.execute(sa.select(files.c.id)).scalars())
        swept = 0
        with disk_errors("cannot sweep the training files"):
            for path in self._directory.iterdir():
                if path.name not in known:
                    path.unlink(missing_ok=True)
                    swept += 1
                known.discard(path.name)
        for lost in sorted(known & self._own_ids()):
            log.error("the bytes of training file %s are missing", lost)
        return swept

    def _own_ids(self) -> set[str]:
        with self._catalog.reading() as connection:
            return {row.id for row in connection.execute(self._mine())}

    def _mine(self) -> sa.Select[Any]:
        mine = sa.select(files).where(files.c.home == self._home)
        return mine if self._tenant is None else mine.where(files.c.tenant == self._tenant)

    def _path(self, file_id: str) -> Path:
        if not FILE_ID.fullmatch(file_id):
            raise ValueError(f"{file_id[:80]!r} is no file's id")
        return self._directory / file_id


def page(
    query: sa.Select[Any], table: sa.Table, after: str | None, limit: int, order: Order
) -> sa.Select[Any]:
    """One more than `limit` rows by their creation, after the row with id `after`."""
    created, identity = table.c.created, table.c.id
    down = order == "desc"
    if after is not None:
        seen = sa.select(created).where(identity == after).scalar_subquery()
        beyond = created < seen if down else created > seen
        further = identity < after if down else identity > after
        query = query.where(beyond | ((created == seen) & further))
    columns = (created.desc(), identity.desc()) if down else (created, identity)
    return query.order_by(*columns).limit(limit + 1)


def _file(row: Sequence[Any]) -> TrainingFile:
    return TrainingFile(**{name: getattr(row, name) for name in TrainingFile.__slots__})


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
