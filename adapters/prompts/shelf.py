"""Named templates in the catalog: versions that stay, aliases that move.

A version that was acknowledged once keeps its number for ever: deletion only marks the row, so
`name@3` never comes to mean something else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from adapters.catalog import ATTEMPTS, Catalog, check_alias
from adapters.errors import (
    AdapterError,
    InvalidAdapter,
    InvalidTemplate,
    StoreUnavailable,
    TemplateInUse,
    TemplateNotFound,
)
from adapters.prompts.template import (
    MAX_DEFINITION,
    PromptTemplate,
    check_name,
    parse_file,
    parse_template,
)
from adapters.room import check_aliases, check_templates
from adapters.sight import end_shares, homes, visible
from adapters.store import VERSION, read_small
from adapters.tables import adapters
from adapters.tables import prompt_aliases as aliases
from adapters.tables import prompt_templates as templates

log = logging.getLogger(__name__)

ALIVE = templates.c.deleted.is_(None)
SUFFIXES = (".yaml", ".yml")
MAX_REFERENCE = 129  # name@alias
PROVENANCE = "prompt_template"  # of an adapter: the digest of the one that it was trained with


@dataclass(frozen=True, slots=True)
class StoredTemplate:
    """One version of a name."""

    name: str
    version: int
    created: str
    template: PromptTemplate

    @property
    def digest(self) -> str:
        return self.template.digest

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class TemplatesReport:
    """What came of a directory of files."""

    added: tuple[StoredTemplate, ...] = ()
    refused: Mapping[str, AdapterError] = field(default_factory=dict)  # file name -> why


class TemplateShelf:
    """The templates of one catalog: its tenant's own, and to read those shared with it.
    Thread-safe.

    Every method raises StoreUnavailable or StoreFull when the database fails.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def of(self, tenant: str) -> TemplateShelf:
        """As this tenant sees it."""
        return TemplateShelf(self._catalog.of(tenant))

    def add(self, name: str, template: PromptTemplate) -> StoredTemplate:
        """Keep a template, checked by the caller, as the next version of `name`.

        The same content again, as the newest version's, returns that one. Raises InvalidTemplate
        (the name), QuotaReached.
        """
        check_name(name)
        for _ in range(ATTEMPTS):
            try:
                with self._catalog.writing() as connection:
                    return self._insert(connection, name, template)
            except IntegrityError:  # another process took this number first
                continue
        raise StoreUnavailable(f"{name}: {ATTEMPTS} other writers came first")

    def get(self, reference: str, version: int | None = None) -> StoredTemplate:
        """`name`, `name@3` or `name@alias`; or a name, and its version. Raises TemplateNotFound."""
        name, at, tag = reference.partition("@")
        shown = reference if version is None else f"{reference}@{version}"
        try:
            check_name(name)
            if at and not VERSION.fullmatch(tag):
                check_alias(tag)
        except (InvalidTemplate, InvalidAdapter) as error:
            raise TemplateNotFound(shown) from error
        if at and version is not None:
            raise InvalidTemplate(
                f"{reference[:200]!r} says which one already; leave out the version", "version"
            )
        query = sa.select(templates).where(ALIVE, templates.c.name == name)
        if at and not VERSION.fullmatch(tag):
            same = sa.and_(
                aliases.c.tenant == templates.c.tenant,
                aliases.c.name == templates.c.name,
                aliases.c.version == templates.c.version,
            )
            query = query.join(aliases, same).where(aliases.c.alias == tag)
        elif at or version is not None:
            query = query.where(templates.c.version == (int(tag) if at else version))
        rows = self._rows(query.order_by(templates.c.version.desc()).limit(1), name)
        if not rows:
            raise TemplateNotFound(shown)
        return _stored(rows[0])

    def page(self, after: str, limit: int, search: str = "") -> list[StoredTemplate]:
        """The newest version of each name behind `after`, by name: of so many names at most. With
        `search`, only names that have it in them."""
        name, tenant = templates.c.name, self._catalog.tenant
        which = [ALIVE, visible(tenant, "template"), name > after]
        if search:
            which.append(name.contains(search, autoescape=True))
        names = sa.select(name).where(*which).group_by(name).order_by(name).limit(limit)
        columns = (templates.c.tenant, name)
        newest = (
            sa.select(*columns, sa.func.max(templates.c.version).label("version"))
            .where(ALIVE, visible(tenant, "template"), name.in_(sa.select(names.subquery())))
            .group_by(*columns)
            .subquery()
        )
        same = sa.and_(
            newest.c.tenant == templates.c.tenant,
            newest.c.name == name,
            newest.c.version == templates.c.version,
        )
        others_first = sa.case((templates.c.tenant == tenant, 1), else_=0)
        query = sa.select(templates).where(ALIVE).join(newest, same)
        query = query.order_by(name, others_first)
        with self._catalog.reading() as connection:
            rows = {row.name: row for row in connection.execute(query)}
        return [_stored(row) for row in rows.values()]

    def versions(self, name: str) -> list[StoredTemplate]:
        """Every living version, oldest first. Raises TemplateNotFound."""
        query = sa.select(templates).where(ALIVE, templates.c.name == name)
        rows = self._rows(query.order_by(templates.c.version), name)
        if not rows:
            raise TemplateNotFound(name)
        return [_stored(row) for row in rows]

    def aliases_of(self, name: str) -> dict[str, int]:
        """Alias -> version."""
        query = sa.select(aliases).where(aliases.c.name == name).order_by(aliases.c.alias)
        return {row.alias: row.version for row in self._rows(query, name, aliases)}

    def delete(self, reference: str) -> tuple[StoredTemplate, ...]:
        """`name` with all its versions, or `name@version`; what was deleted.

        Raises TemplateNotFound; TemplateInUse where an alias points there, or an adapter was
        trained with it.
        """
        name, at, tag = reference.partition("@")
        if at and not VERSION.fullmatch(tag):
            raise TemplateNotFound(reference)
        which = [templates.c.tenant == self._catalog.tenant, templates.c.name == name]
        held = [aliases.c.tenant == self._catalog.tenant, aliases.c.name == name]
        if at:
            which.append(templates.c.version == int(tag))
            held.append(aliases.c.version == int(tag))
        others = sa.not_(sa.and_(*which))
        which.append(ALIVE)
        with self._catalog.writing() as connection:
            rows = connection.execute(sa.select(templates).where(*which)).all()
            if not rows:
                raise TemplateNotFound(reference)
            holder = connection.execute(sa.select(aliases.c.alias).where(*held)).scalars().first()
            if holder is not None:
                raise TemplateInUse(
                    f"the alias {name}@{holder} points to it: move or drop it first"
                )
            for row in rows:
                self._refuse_if_trained_with(connection, row, others)
            now = _now()
            connection.execute(sa.update(templates).where(*which).values(deleted=now))
            end_shares(connection, "template", self._catalog.tenant, name)
        return tuple(_stored(row) for row in rows)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point `name@alias` to a version. Raises InvalidAdapter (the alias), TemplateNotFound,
        QuotaReached."""
        check_alias(alias)
        tenant = self._catalog.tenant
        living = sa.select(templates.c.version).where(
            ALIVE,
            templates.c.tenant == tenant,
            templates.c.name == name,
            templates.c.version == version,
        )
        with self._catalog.writing() as connection:
            if connection.execute(living).first() is None:
                raise TemplateNotFound(f"{name}@{version}")
            check_aliases(connection, aliases, tenant, name, alias)
            mine = (aliases.c.tenant == tenant, aliases.c.name == name)
            connection.execute(sa.delete(aliases).where(*mine, aliases.c.alias == alias))
            row = {"tenant": tenant, "name": name, "alias": alias, "version": version}
            connection.execute(sa.insert(aliases).values(**row))

    def drop_alias(self, name: str, alias: str) -> None:
        """Raises TemplateNotFound."""
        mine = (aliases.c.tenant == self._catalog.tenant, aliases.c.name == name)
        which = (*mine, aliases.c.alias == alias)
        with self._catalog.writing() as connection:
            if connection.execute(sa.delete(aliases).where(*which)).rowcount == 0:
                raise TemplateNotFound(f"{name}@{alias}")

    def load_directory(
        self, path: Path, check: Callable[[PromptTemplate], None]
    ) -> TemplatesReport:
        """Add every YAML file, under its `name` or else its own. `check` tries a template.

        Doing it again adds nothing new. A bad one is reported and does not stop the others.
        """
        added: list[StoredTemplate] = []
        refused: dict[str, AdapterError] = {}
        for file in sorted(p for p in path.iterdir() if p.suffix in SUFFIXES):
            try:
                name, template = read_template(file)
                check(template)
                added.append(self.add(name, template))
            except AdapterError as error:
                log.warning("template %s was refused: %s", file.name, error)
                refused[file.name] = error
        return TemplatesReport(tuple(added), refused)

    def _rows(
        self, query: sa.Select[Any], name: str, table: sa.Table = templates
    ) -> Sequence[sa.Row[Any]]:
        """What a query finds of a name: among one's own, or what is shared in its place."""
        with self._catalog.reading() as connection:
            for home in homes(connection, self._catalog.tenant, "template", name):
                rows = connection.execute(query.where(table.c.tenant == home)).all()
                if rows:
                    return rows
        return ()

    def _insert(
        self, connection: sa.Connection, name: str, template: PromptTemplate
    ) -> StoredTemplate:
        tenant = self._catalog.tenant
        mine = sa.select(templates).where(templates.c.tenant == tenant, templates.c.name == name)
        order = templates.c.version.desc()
        newest = connection.execute(mine.where(ALIVE).order_by(order).limit(1)).first()
        if newest is not None and newest.digest == template.digest:
            return _stored(newest)
        if newest is None:  # an earlier server did not end them
            end_shares(connection, "template", tenant, name)
        check_templates(connection, tenant)
        # Deleted rows count: their numbers are never given again.
        last = connection.execute(mine.order_by(order).limit(1)).first()
        made = StoredTemplate(name, last.version + 1 if last else 1, _now(), template)
        connection.execute(
            sa.insert(templates).values(
                tenant=tenant,
                name=name,
                version=made.version,
                digest=made.digest,
                # Not the canonical form: variables keep their order.
                definition=json.dumps(template.plain(), ensure_ascii=False),
                created=made.created,
            )
        )
        return made

    def _refuse_if_trained_with(
        self, connection: sa.Connection, row: Any, others: sa.ColumnElement[bool]
    ) -> None:
        """An adapter that was trained with a content needs one version, among `others`, of it."""
        tenant = self._catalog.tenant
        same = sa.select(templates.c.version).where(
            ALIVE, others, templates.c.tenant == tenant, templates.c.digest == row.digest
        )
        query = sa.select(adapters.c.name, adapters.c.version, adapters.c.manifest)
        query = query.where(adapters.c.tenant == tenant, adapters.c.deleted.is_(None))
        query = query.where(adapters.c.manifest.contains(row.digest))
        for user in connection.execute(query):
            provenance = json.loads(user.manifest).get("provenance") or {}
            if provenance.get(PROVENANCE) != row.digest:
                continue
            if connection.execute(same).first() is None:
                raise TemplateInUse(
                    f"the adapter {user.name}@{user.version} was trained with "
                    f"{row.name}@{row.version}: remove that first"
                )


def read_template(file: Path) -> tuple[str, PromptTemplate]:
    """(name, definition) of a YAML file; its own name where it says none. Raises AdapterError."""
    raw = read_small(file, 2 * MAX_DEFINITION, file.name)
    name, template = parse_file(raw, file.name)
    return check_name(name or file.stem), template


def _stored(row: Any) -> StoredTemplate:
    return StoredTemplate(
        row.name, row.version, row.created, parse_template(json.loads(row.definition))
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
