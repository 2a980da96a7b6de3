"""Which rows a tenant sees: its own, and where it has none of a name, those shared with it.

The catalog and the templates' shelf look names up by these, and end the shares of names that they
delete; `sharing.py` writes the shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import sqlalchemy as sa

from adapters.tables import adapters, prompt_templates, shares

Kind = Literal["adapter", "template"]
EVERYONE = "*"
NAMED: dict[Kind, sa.Table] = {"adapter": adapters, "template": prompt_templates}


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


def shared(tenant: str, kind: Kind) -> sa.ColumnElement[bool]:
    """Of the rows of a kind: those that others share with one."""
    table = NAMED[kind]
    those = sa.select(shares.c.tenant, shares.c.name).where(*_to(tenant, kind))
    return sa.tuple_(table.c.tenant, table.c.name).in_(those)


def visible(tenant: str, kind: Kind) -> sa.ColumnElement[bool]:
    """Of the rows of a kind: one's own, and those that are shared with one."""
    table = NAMED[kind]
    here = sa.select(shares.c.name).where(
        shares.c.tenant == table.c.tenant, shares.c.name == table.c.name, *_to(tenant, kind)
    )
    return sa.or_(table.c.tenant == tenant, sa.exists(here))


def end_shares(connection: sa.Connection, kind: Kind, tenant: str, name: str) -> None:
    """Nobody reads a name that has no living version any more: the next who is given it has not
    been shared."""
    table = NAMED[kind]
    living = sa.select(table.c.name).where(
        table.c.deleted.is_(None), table.c.tenant == tenant, table.c.name == name
    )
    those = (shares.c.kind == kind, shares.c.tenant == tenant, shares.c.name == name)
    connection.execute(sa.delete(shares).where(*those, ~sa.exists(living)))


def _to(tenant: str, kind: Kind) -> Sequence[sa.ColumnElement[bool]]:
    return (
        shares.c.kind == kind,
        shares.c.tenant != tenant,
        shares.c.audience.in_([tenant, EVERYONE]),
    )
