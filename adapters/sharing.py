"""What one tenant lets others read: a name with all its versions and aliases, never to write.

Whoever looks a name up finds its own; where it has none, the one that is shared with it. So two
tenants cannot share one name with the same third: the second is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa

from adapters.errors import AdapterNotFound, InvalidAdapter, TemplateNotFound
from adapters.tables import adapters, prompt_templates, shares

if TYPE_CHECKING:
    from adapters.catalog import Catalog

Kind = Literal["adapter", "template"]
EVERYONE = "*"
NAMED: dict[Kind, sa.Table] = {"adapter": adapters, "template": prompt_templates}


@dataclass(frozen=True, slots=True)
class Share:
    """A name of `tenant`, and who may read it: tenants, or everyone."""

    kind: Kind
    tenant: str
    name: str
    audience: tuple[str, ...]


class Shares:
    """The rows. Thread-safe; raises StoreUnavailable, StoreFull."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def set(self, share: Share) -> None:
        """Let exactly this audience read; an empty one is nobody.

        Raises AdapterNotFound, TemplateNotFound; InvalidAdapter where another tenant shares this
        name with some of them.
        """
        mine = (
            shares.c.kind == share.kind,
            shares.c.tenant == share.tenant,
            shares.c.name == share.name,
        )
        with self._catalog.writing() as connection:
            if share.audience:
                self._check(connection, share)
            connection.execute(sa.delete(shares).where(*mine))
            own = {"kind": share.kind, "tenant": share.tenant, "name": share.name}
            for audience in sorted(set(share.audience)):
                connection.execute(sa.insert(shares).values(**own, audience=audience))

    def list(self) -> list[Share]:
        columns = (shares.c.kind, shares.c.tenant, shares.c.name, shares.c.audience)
        with self._catalog.reading() as connection:
            rows = connection.execute(sa.select(*columns).order_by(*columns)).all()
        found: dict[tuple[Kind, str, str], list[str]] = {}
        for row in rows:
            found.setdefault((row.kind, row.tenant, row.name), []).append(row.audience)
        return [Share(*key, tuple(audience)) for key, audience in found.items()]

    def _check(self, connection: sa.Connection, share: Share) -> None:
        table = NAMED[share.kind]
        living = sa.select(table.c.name).where(
            table.c.deleted.is_(None), table.c.tenant == share.tenant, table.c.name == share.name
        )
        if connection.execute(living.limit(1)).first() is None:
            missing = AdapterNotFound if share.kind == "adapter" else TemplateNotFound
            raise missing(share.name)
        same = sa.select(shares.c.tenant).where(
            shares.c.kind == share.kind, shares.c.name == share.name
        )
        others = same.where(shares.c.tenant != share.tenant)
        if EVERYONE not in share.audience:
            others = others.where(shares.c.audience.in_([*share.audience, EVERYONE]))
        if (other := connection.execute(others.limit(1)).scalar()) is not None:
            raise InvalidAdapter(
                f"tenant {other!r} shares {share.kind} {share.name!r} with some of them already",
                "audience",
            )


def homes(connection: sa.Connection, tenant: str, kind: Kind, name: str) -> Iterator[str]:
    """The tenants whose `name` is meant, in turn: one's own, and where there is none of that name,
    the one who shares it. What is another's and what is nowhere take the same road."""
    yield tenant
    table = NAMED[kind]
    own = sa.select(table.c.name).where(
        table.c.deleted.is_(None), table.c.tenant == tenant, table.c.name == name
    )
    if connection.execute(own.limit(1)).first() is None:
        query = sa.select(shares.c.tenant).where(shares.c.name == name, *_to(tenant, kind))
        if (home := connection.execute(query.limit(1)).scalar()) is not None:
            yield home


def visible(tenant: str, kind: Kind) -> sa.ColumnElement[bool]:
    """Of the rows of a kind: one's own, and those that are shared with one."""
    table = NAMED[kind]
    here = sa.select(shares.c.name).where(
        shares.c.tenant == table.c.tenant, shares.c.name == table.c.name, *_to(tenant, kind)
    )
    return sa.or_(table.c.tenant == tenant, sa.exists(here))


def _to(tenant: str, kind: Kind) -> Sequence[sa.ColumnElement[bool]]:
    return (
        shares.c.kind == kind,
        shares.c.tenant != tenant,
        shares.c.audience.in_([tenant, EVERYONE]),
    )
