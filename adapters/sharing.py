"""What one tenant lets others read: a name with all its versions and aliases, never to write, for
as long as it has any.

Whoever looks a name up finds its own; where it has none, the one that is shared with it. So two
tenants cannot share one name with the same third: the second is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from adapters.catalog import Catalog
from adapters.errors import AdapterNotFound, InvalidAdapter, TemplateNotFound
from adapters.sight import EVERYONE, NAMED, Kind
from adapters.tables import shares


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
            dropped = connection.execute(sa.delete(shares).where(*mine)).rowcount
            if not share.audience and not dropped:  # an earlier server left such
                _check_there(connection, share)
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
        _check_there(connection, share)
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


def _check_there(connection: sa.Connection, share: Share) -> None:
    table = NAMED[share.kind]
    living = sa.select(table.c.name).where(
        table.c.deleted.is_(None), table.c.tenant == share.tenant, table.c.name == share.name
    )
    if connection.execute(living.limit(1)).first() is None:
        missing = AdapterNotFound if share.kind == "adapter" else TemplateNotFound
        raise missing(share.name)
