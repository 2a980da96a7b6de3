"""The catalog: which versions a name has, and which aliases point where. One row, one version.

A version that was acknowledged once keeps its number for ever: deletion only marks the row, so
`name@3` never comes to mean something else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from adapters import evaluation
from adapters.errors import (
    AdapterInUse,
    AdapterNotFound,
    InvalidAdapter,
    StoreFull,
    StoreUnavailable,
    Unkeepable,
)
from adapters.manifest import DEFAULT_TENANT, AdapterManifest
from adapters.room import check_aliases, check_room
from adapters.sight import end_shares, homes, shared, visible
from adapters.tables import adapters, arms, manifest_json, metadata, served, totals
from adapters.traffic import Arm

__all__ = ["Catalog", "check_alias", "check_name", "metadata"]

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MIGRATIONS = Path(__file__).with_name("migrations")
HEAD = "0009"
BUSY_SECONDS = 10  # for the one who writes
EXCLUSIVE_SECONDS = 120  # for one who changes blobs and rows together
ATTEMPTS = 5
PAGE = 500  # names, where all are read
IN_ONE_QUERY = 500  # values
CACHE_KIB = 256  # of SQLite's pages, for each connection: the system caches the file as well
# PostgreSQL's advisory locks: one writes at a time, as SQLite has it, migrations among them; and
# one replica at a time changes blobs and rows together.
WRITING_LOCK, EXCLUSIVE_LOCK = 0x6E62_0001, 0x6E62_0002

ALIVE = adapters.c.deleted.is_(None)


def check_name(name: str, where: str = "name") -> str:
    """The name itself, when it is one. Raises InvalidAdapter."""
    if not NAME.fullmatch(name):
        raise InvalidAdapter(
            f"{name[:80]!r}, expected 1 to 64 of a-z, 0-9, '.', '_', '-', "
            "beginning with a letter or a digit",
            where,
        )
    return name


def check_alias(alias: str) -> str:
    """The alias itself, when it is one; digits alone are a version. Raises InvalidAdapter."""
    if alias.isdigit():
        raise InvalidAdapter(f"{alias[:80]!r} would read as a version", "alias")
    return check_name(alias, "alias")


class Catalog:
    """The rows, behind SQLAlchemy: a path is SQLite's file, PostgreSQL comes by URL. Thread-safe.

    Names are those of one tenant, or shared with it; what it writes is its own. Every method
    raises StoreUnavailable (or StoreFull) when the database fails.
    """

    def __init__(self, url: str, *, migrate: bool = True) -> None:
        """`migrate`: bring its tables up to date; else they are only read, as they are."""
        # A connection that the database has closed meanwhile is replaced before it is used.
        url = url if "://" in url else f"sqlite:///{url}"
        self._engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if self._engine.dialect.name == "sqlite":
            _tune_sqlite(self._engine)
        elif self._engine.dialect.name == "postgresql":
            _tune_postgresql(self._engine)
        self._writer = self._engine.execution_options(writing=True)
        self.tenant = DEFAULT_TENANT
        try:
            if migrate:
                self._migrate()
        except BaseException:
            self.close()
            raise

    def of(self, tenant: str) -> Catalog:
        """The same rows as this tenant sees them."""
        found = copy(self)
        found.tenant = tenant
        return found

    def close(self) -> None:
        self._engine.dispose()

    # Reading

    def latest(self, name: str) -> AdapterManifest:
        return self._one_of(name, name, order=adapters.c.version.desc())

    def version(self, name: str, version: int) -> AdapterManifest:
        return self._one_of(name, f"{name}@{version}", adapters.c.version == version)

    def alias(self, name: str, alias: str) -> tuple[Arm, ...]:
        """The arms of an alias, the largest share first."""
        same = sa.and_(
            arms.c.tenant == adapters.c.tenant,
            arms.c.name == adapters.c.name,
            arms.c.version == adapters.c.version,
        )
        query = (
            sa.select(adapters.c.manifest, arms.c.weight)
            .where(ALIVE, arms.c.name == name, arms.c.alias == alias)
            .join(arms, same)
            .order_by(arms.c.weight.desc(), arms.c.version)
        )
        rows = self._rows(query, name)
        if not rows:
            raise AdapterNotFound(f"{name}@{alias}")
        return tuple(Arm(AdapterManifest.from_json(row.manifest), row.weight) for row in rows)

    def digest(self, digest: str) -> AdapterManifest:
        """The newest living row of a digest, one's own before those of others."""
        own = sa.case((adapters.c.tenant == self.tenant, 0), else_=1)
        rows = _manifests().where(adapters.c.digest == digest, visible(self.tenant, "adapter"))
        return self._one(rows.order_by(own, adapters.c.created.desc()), f"sha256:{digest}")

    def digest_anywhere(self, digest: str, *, living: bool) -> AdapterManifest:
        """The newest row of a digest, of any tenant: never for what a client names. `living` or
        not, those that live before the others."""
        rows = _manifests() if living else sa.select(adapters.c.manifest)
        order = (sa.case((ALIVE, 0), else_=1), adapters.c.created.desc())
        query = rows.where(adapters.c.digest == digest).order_by(*order)
        return self._one(query, f"sha256:{digest}")

    def page(
        self,
        after: str,
        limit: int,
        digests: Collection[str] | None = None,
        search: str = "",
    ) -> list[AdapterManifest]:
        """The newest version of each name behind `after`, by name: of so many names at most.
        With `digests`, only names that have one of these, as their newest version or not; with
        `search`, only names that have it in them."""
        mine, theirs = adapters.c.tenant == self.tenant, shared(self.tenant, "adapter")
        which = [adapters.c.name > after]
        if search:
            which.append(adapters.c.name.contains(search, autoescape=True))
        if digests is not None:
            which.append(adapters.c.digest.in_(digests))
        both = sa.union(*(_names(limit, whose, *which) for whose in (mine, theirs)))
        every = both.subquery()
        query = sa.select(every.c.name).order_by(every.c.name).limit(limit)
        found: dict[str, str] = {}
        with self.reading() as connection:
            names = connection.execute(query).scalars().all()
            for whose in (theirs, mine):  # its own stands before another's of the same name
                rows = connection.execute(_newest(whose, names))
                found.update((row.name, row.manifest) for row in rows)
        return [AdapterManifest.from_json(found[name]) for name in names if name in found]

    def all_latest(self) -> list[AdapterManifest]:
        """The newest version of every name, by name."""
        found: list[AdapterManifest] = []
        while more := self.page(found[-1].name if found else "", PAGE):
            found += more
        return found

    def versions(self, name: str) -> list[AdapterManifest]:
        """Every living version of a name, oldest first."""
        query = _manifests().where(adapters.c.name == name).order_by(adapters.c.version)
        return [AdapterManifest.from_json(row.manifest) for row in self._rows(query, name)]

    def everything(self) -> list[AdapterManifest]:
        """Of all tenants."""
        return self._many(_manifests().order_by(adapters.c.name, adapters.c.version))

    def made_for(self, base_fingerprint: str) -> int:
        """How many living versions, of all tenants, were made for a base."""
        made_for = manifest_json(self._engine.dialect.name)["base_fingerprint"].as_string()
        query = sa.select(sa.func.count()).select_from(adapters)
        with self.reading() as connection:
            found = connection.execute(query.where(ALIVE, made_for == base_fingerprint))
            return int(found.scalar_one())

    def aliases_of(self, name: str) -> dict[str, dict[int, float]]:
        """Alias -> version -> weight, the largest share first."""
        query = sa.select(arms).where(arms.c.name == name)
        query = query.order_by(arms.c.alias, arms.c.weight.desc(), arms.c.version)
        rows = self._rows(query, name, arms)
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            found.setdefault(row.alias, {})[row.version] = row.weight
        return found

    def blobs_in_use(self) -> set[str]:
        """Addresses of all blobs that a living row needs, whosever."""
        columns = (adapters.c.weights_sha256, adapters.c.tokenizer_sha256)
        with self.reading() as connection:
            rows = connection.execute(sa.select(*columns).where(ALIVE)).all()
        return {address for row in rows for address in row if address is not None}

    def blobs_needed(self, by: Iterable[AdapterManifest]) -> set[str]:
        """Of the blobs that these need, those that a living row needs too, whosever. By index: a
        deletion does not read the rows of all that were ever deleted."""
        manifests = list(by)
        own = {one.tokenizer_sha256 for one in manifests} - {None}
        asked = (
            (adapters.c.weights_sha256, {one.weights_sha256 for one in manifests}),
            (adapters.c.tokenizer_sha256, own),
        )
        found: set[str] = set()
        with self.reading() as connection:
            for column, addresses in asked:
                for some in _pieces(sorted(filter(None, addresses)), IN_ONE_QUERY):
                    living = sa.select(column).where(ALIVE, column.in_(some)).distinct()
                    found.update(connection.execute(living).scalars())
        return found

    # Writing

    def add(self, draft: AdapterManifest) -> AdapterManifest:
        """Add the draft as the next version of its name; the manifest with its number.

        Where the newest version is the same already, that one is returned and nothing is added:
        only an evaluation that the draft brings takes the place of what was measured before.
        Raises QuotaReached.
        """
        for _ in range(ATTEMPTS):
            try:
                with self.writing() as connection:
                    return _insert(connection, draft, self.tenant)
            except IntegrityError:  # another process took this number first
                continue
        raise StoreUnavailable(f"{draft.name}: {ATTEMPTS} other writers came first")

    def delete(self, name: str, version: int | None, when: str) -> list[AdapterManifest]:
        """Mark one version, or all of a name, as deleted; what was. Raises AdapterInUse.

        With the last version of a name its shares end.
        """
        which = [adapters.c.tenant == self.tenant, adapters.c.name == name]
        held = [arms.c.tenant == self.tenant, arms.c.name == name]
        if version is not None:
            which.append(adapters.c.version == version)
            held.append(arms.c.version == version)
        with self.writing() as connection:
            rows = connection.execute(_manifests().where(*which)).scalars().all()
            if not rows:
                raise AdapterNotFound(name if version is None else f"{name}@{version}")
            holder = connection.execute(sa.select(arms.c.alias).where(*held)).scalars().first()
            if holder is not None:
                raise AdapterInUse(f"the alias {name}@{holder} points to it: move or drop it first")
            connection.execute(sa.update(adapters).where(*which, ALIVE).values(deleted=when))
            end_shares(connection, "adapter", self.tenant, name)
        return [AdapterManifest.from_json(row) for row in rows]

    def set_alias(self, name: str, alias: str, shares: Mapping[int, float]) -> None:
        """Point an alias of `name` to living versions of it: version -> weight. Raises
        QuotaReached."""
        key = (arms.c.tenant == self.tenant, arms.c.name == name, arms.c.alias == alias)
        own = {"tenant": self.tenant, "name": name, "alias": alias}
        mine = _manifests().where(adapters.c.tenant == self.tenant, adapters.c.name == name)
        with self.writing() as connection:
            for version in shares:
                living = mine.where(adapters.c.version == version)
                if connection.execute(living).first() is None:
                    raise AdapterNotFound(f"{name}@{version}")
            check_aliases(connection, arms, self.tenant, name, alias)
            connection.execute(sa.delete(arms).where(*key))
            rows = [{**own, "version": v, "weight": weight} for v, weight in shares.items()]
            connection.execute(sa.insert(arms), rows)

    def drop_alias(self, name: str, alias: str) -> None:
        """Take an alias away, and what was counted under it."""
        with self.writing() as connection:
            key = (arms.c.tenant == self.tenant, arms.c.name == name, arms.c.alias == alias)
            if connection.execute(sa.delete(arms).where(*key)).rowcount == 0:
                raise AdapterNotFound(f"{name}@{alias}")
            for table in (served, totals):
                mine = (table.c.tenant == self.tenant, table.c.name == name)
                connection.execute(sa.delete(table).where(*mine, table.c.alias == alias))

    # The connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read by. Raises StoreUnavailable."""
        with self._errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction, and nobody else's beside it: what it read is so until it ends.

        Raises StoreUnavailable, StoreFull, IntegrityError.
        """
        with self._errors(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held by one replica at a time while blobs and rows change together; it reads and writes
        by other connections meanwhile. SQLite is one machine's, where a file lock does it.

        Raises StoreUnavailable.
        """
        if self._engine.dialect.name != "postgresql":
            yield
            return
        with self._errors(), self._engine.begin() as connection:
            _lock(connection, EXCLUSIVE_LOCK, EXCLUSIVE_SECONDS)
            yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DataError as error:  # of PostgreSQL, which has texts without NUL
            raise Unkeepable(f"the catalog cannot keep such a value: {error.orig}") from error
        except SQLAlchemyError as error:
            # The driver's own words; SQLAlchemy's would carry the statement and its values.
            words = str(getattr(error, "orig", None) or type(error).__name__)
            kind = StoreFull if "disk is full" in words else StoreUnavailable
            raise kind(f"the catalog failed: {words}") from error

    def _one_of(
        self,
        name: str,
        reference: str,
        *which: sa.ColumnElement[bool],
        order: sa.ColumnElement[Any] | None = None,
    ) -> AdapterManifest:
        query = _manifests().where(adapters.c.name == name, *which).order_by(order)
        rows = self._rows(query.limit(1), name)
        if not rows:
            raise AdapterNotFound(reference)
        return AdapterManifest.from_json(rows[0].manifest)

    def _rows(
        self, query: sa.Select[Any], name: str, table: sa.Table = adapters
    ) -> Sequence[sa.Row[Any]]:
        """What a query finds of a name: among one's own, or what is shared in its place."""
        with self.reading() as connection:
            for home in homes(connection, self.tenant, "adapter", name):
                rows = connection.execute(query.where(table.c.tenant == home)).all()
                if rows:
                    return rows
        return ()

    def _one(self, query: sa.Select[str], reference: str) -> AdapterManifest:
        with self.reading() as connection:
            row = connection.execute(query.limit(1)).scalars().first()
        if row is None:
            raise AdapterNotFound(reference)
        return AdapterManifest.from_json(row)

    def _many(self, query: sa.Select[str]) -> list[AdapterManifest]:
        with self.reading() as connection:
            return [AdapterManifest.from_json(row) for row in connection.execute(query).scalars()]

    def _migrate(self) -> None:
        with self.writing() as connection:
            if sa.inspect(connection).has_table("alembic_version"):
                at = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
                if at == HEAD:
                    return
                if at is not None and at > HEAD:
                    raise StoreUnavailable(
                        f"the catalog has revision {at}, and this server knows those up to {HEAD}: "
                        "start a version as new as the one that made it"
                    )
            from alembic import command  # slow to import, and seldom needed
            from alembic.config import Config

            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            command.upgrade(config, HEAD)


def _pieces(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (values[at : at + size] for at in range(0, len(values), size))


def _manifests() -> sa.Select[str]:
    return sa.select(adapters.c.manifest).where(ALIVE)


def _names(limit: int, *which: sa.ColumnElement[bool]) -> sa.Select[tuple[str]]:
    """The first of the living names."""
    name = adapters.c.name
    query = sa.select(name).where(ALIVE, *which).group_by(name).order_by(name)
    return sa.select(query.limit(limit).subquery())


def _newest(whose: sa.ColumnElement[bool], names: Sequence[str]) -> sa.Select[tuple[str, str]]:
    """Of each name the newest living version."""
    key = (adapters.c.tenant, adapters.c.name)
    last = sa.func.max(adapters.c.version).label("version")
    living = sa.select(*key, last).where(ALIVE, whose, adapters.c.name.in_(names))
    newest = living.group_by(*key).subquery()
    same = [column == newest.c[column.name] for column in (*key, adapters.c.version)]
    return sa.select(adapters.c.name, adapters.c.manifest).join(newest, sa.and_(*same))


def _insert(connection: sa.Connection, draft: AdapterManifest, tenant: str) -> AdapterManifest:
    mine = sa.and_(adapters.c.tenant == tenant, adapters.c.name == draft.name)
    newest = _manifests().where(mine).order_by(adapters.c.version.desc()).limit(1)
    row = connection.execute(newest).scalars().first()
    if row is not None:
        found = AdapterManifest.from_json(row)
        if _same(found, draft):
            return _measured_again(connection, found, draft, tenant)
    else:  # an earlier server did not end them
        end_shares(connection, "adapter", tenant, draft.name)
    check_room(connection, tenant, draft=draft)
    # Deleted rows count: their numbers are never given again.
    last = connection.execute(sa.select(sa.func.max(adapters.c.version)).where(mine)).scalar()
    manifest = replace(draft, version=(last or 0) + 1)
    connection.execute(
        sa.insert(adapters).values(
            tenant=tenant,
            name=manifest.name,
            version=manifest.version,
            digest=manifest.digest,
            weights_sha256=manifest.weights_sha256,
            manifest=manifest.to_json(),
            created=manifest.created,
            tokenizer_sha256=manifest.tokenizer_sha256,
        )
    )
    return manifest


def _measured_again(
    connection: sa.Connection, found: AdapterManifest, draft: AdapterManifest, tenant: str
) -> AdapterManifest:
    """An evaluation may be made at any time after its version: it is the one thing that changes."""
    measured = draft.provenance.get(evaluation.KEY)
    if measured is None or measured == found.provenance.get(evaluation.KEY):
        return found
    manifest = replace(found, provenance={**found.provenance, evaluation.KEY: measured})
    own = (adapters.c.tenant == tenant, adapters.c.name == found.name)
    mine = sa.update(adapters).where(*own, adapters.c.version == found.version)
    connection.execute(mine.values(manifest=manifest.to_json()))
    return manifest


def _same(one: AdapterManifest, other: AdapterManifest) -> bool:
    return (one.digest, one.placement, one.merged_dtype, one.template) == (
        other.digest,
        other.placement,
        other.merged_dtype,
        other.template,
    )


def _tune_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        del record
        connection.isolation_level = None  # the driver begins nothing by itself; `begin` does
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # a commit survives a power loss
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer takes the lock at once: one that reads first could not be promoted later.
        writing = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _tune_postgresql(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options().get("writing", False):
            _lock(connection, WRITING_LOCK, BUSY_SECONDS)


def _lock(connection: sa.Connection, key: int, seconds: int) -> None:
    """Wait for a lock that goes with the transaction. Every later statement sees what was done
    before by those who held it: at READ COMMITTED each has a snapshot of its own."""
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{seconds}s'")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({key})")
