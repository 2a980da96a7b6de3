"""What one tenant may use of a server: asked before a body is read, reserved before a prompt is.

Requests and tokens of a minute are counted in a sliding window (`limits`: here, or in a Redis that
several servers share). Tokens are reserved by what a request could come to at most and settled by
what it came to, so a tenant cannot pass its limit by asking for much at once, and is charged for
nothing that it did not get. What runs at the same time is counted by each server for itself.
Adapters, templates and bytes are counted by the catalog, in the transaction that adds them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from adapters.catalog import Catalog
from adapters.manifest import DEFAULT_TENANT
from adapters.tables import tenants
from service.errors import NotFound, QuotaExceeded

if TYPE_CHECKING:
    from service.access.windows import Windows

SECONDS = 0.5  # how long a tenant's quotas are remembered
REMEMBERED = 4096  # tenants
BUSY_SECONDS = 1.0  # after which to try again where too much runs at once
MINUTE = 60.0  # how long what was reserved counts: later there is nothing to give back


@dataclass(frozen=True, slots=True)
class Quotas:
    """The limits of one tenant; None: none."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and of outputs
    concurrency: int | None = None  # requests at the same time, on each server
    adapters: int | None = None  # versions
    templates: int | None = None  # versions
    bytes: int | None = None  # of adapters, training files and collections
    train_minutes: int | None = None  # in thirty days

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value})

    def view(self) -> dict[str, int | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, text: str | None) -> Quotas:
        given = json.loads(text or "{}")
        return cls(**{one.name: given.get(one.name) for one in fields(cls)})


NONE = Quotas()


@dataclass(frozen=True, slots=True)
class Tenant:
    """A row: who holds keys here."""

    name: str
    created: float
    quotas: Quotas


class Tenants:
    """The rows. Thread-safe; raises StoreUnavailable, StoreFull."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def list(self) -> list[Tenant]:
        with self._catalog.reading() as connection:
            rows = connection.execute(sa.select(tenants).order_by(tenants.c.name)).all()
        return [Tenant(row.name, row.created, Quotas.from_json(row.quotas)) for row in rows]

    def check(self, names: Iterable[str], field: str) -> None:
        """Raises NotFound for one that is not there."""
        wanted = set(names) - {DEFAULT_TENANT}
        query = sa.select(tenants.c.name).where(tenants.c.name.in_(wanted))
        with self._catalog.reading() as connection:
            missing = wanted.difference(connection.execute(query).scalars())
        if missing:
            raise NotFound(f"tenant {min(missing)[:80]!r} has no keys yet: make one first", field)

    def quotas(self, name: str) -> Quotas:
        """None at all for a tenant that is not there."""
        query = sa.select(tenants.c.quotas).where(tenants.c.name == name)
        with self._catalog.reading() as connection:
            return Quotas.from_json(connection.execute(query).scalar())

    def set_quotas(self, name: str, quotas: Quotas) -> None:
        """In place of those before. Raises NotFound."""
        change = sa.update(tenants).where(tenants.c.name == name)
        with self._catalog.writing() as connection:
            if connection.execute(change.values(quotas=quotas.to_json())).rowcount == 0:
                raise NotFound(f"tenant {name[:80]!r} has no keys yet: make one first", "tenant")


class Meter:
    """Counts what tenants use. One event loop only."""

    def __init__(self, tenants: Tenants, store: str | None = None) -> None:
        """`store`: where minutes are counted, `async+redis://host:port`; None: here."""
        self.tenants = tenants
        self._store = store
        self._made: Windows | None = None
        self._known: OrderedDict[str, tuple[float, Quotas]] = OrderedDict()
        self._inside: Counter[str] = Counter()

    async def admit(self, tenant: str, *, generates: bool = True) -> Lease:
        """Let one request begin; one that generates nothing may, whatever tokens are left.

        Raises QuotaExceeded, StoreUnavailable.
        """
        quotas = await self.quotas(tenant)
        self._check_concurrency(tenant, quotas)
        if generates and quotas.tokens_per_minute is not None:
            await self._spend(tenant, "tokens", quotas.tokens_per_minute, 1, keep=False)
        if quotas.requests_per_minute is not None:
            await self._spend(tenant, "requests", quotas.requests_per_minute, 1)
        # Others came in while the window was asked.
        self._check_concurrency(tenant, quotas)
        self._inside[tenant] += 1
        return Lease(self, tenant, quotas)

    @property
    def _windows(self) -> Windows:
        if self._made is None:
            from service.access.windows import Windows

            self._made = Windows(self._store)
        return self._made

    async def quotas(self, tenant: str) -> Quotas:
        until, found = self._known.get(tenant, (0.0, NONE))
        if time.monotonic() >= until:
            asked = time.monotonic()
            found = await asyncio.to_thread(self.tenants.quotas, tenant)
            self._known[tenant] = (asked + SECONDS, found)
            self._known.move_to_end(tenant)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return found

    def forget(self, tenant: str) -> None:
        """Ask the catalog anew when this tenant comes next."""
        self._known.pop(tenant, None)

    def _check_concurrency(self, tenant: str, quotas: Quotas) -> None:
        most = quotas.concurrency
        if most is not None and self._inside[tenant] >= most:
            raise QuotaExceeded(
                f"tenant {tenant!r} may have {most} requests at the same time, and has them",
                BUSY_SECONDS,
            )

    async def _spend(
        self, tenant: str, what: str, most: int, amount: int, *, keep: bool = True
    ) -> None:
        over = await self._windows.take(tenant, what, most, amount, keep=keep)
        if over is not None:
            left, seconds = over
            raise QuotaExceeded(
                f"tenant {tenant!r} may use {most} {what} a minute, {left} are left and this "
                f"wants {amount}",
                seconds,
            )

    async def give_back(self, tenant: str, most: int, tokens: int) -> None:
        await self._windows.take(tenant, "tokens", most, -tokens)

    def _left(self, tenant: str) -> None:
        self._inside[tenant] -= 1
        if not self._inside[tenant]:
            del self._inside[tenant]


class Lease:
    """One request of a tenant: what it has reserved, until `close`."""

    def __init__(self, meter: Meter, tenant: str, quotas: Quotas) -> None:
        self._meter = meter
        self._tenant = tenant
        self.quotas = quotas
        self._most = quotas.tokens_per_minute
        self._reserved = 0
        self._used = 0
        self._since = 0.0  # of the first reservation
        self._open = True

    async def reserve(self, tokens: int) -> None:
        """Have so many more, of a whole minute's at most: what a request could come to. Raises
        QuotaExceeded; what was reserved before stays so."""
        if self._most is not None:
            amount = min(tokens, self._most - self._reserved)
            if amount > 0:
                await self._meter._spend(self._tenant, "tokens", self._most, amount)
                self._since = self._since or time.monotonic()
                self._reserved += amount

    def use(self, tokens: int) -> None:
        """So many were computed."""
        self._used += tokens

    async def close(self) -> None:
        """The request is over, however: give back what it did not use. Idempotent."""
        if not self._open:
            return
        self._open = False
        self._meter._left(self._tenant)
        unused = self._reserved - self._used
        if unused > 0 and time.monotonic() - self._since >= MINUTE:
            return  # it would be another minute's
        if self._most is not None and unused:  # what was used beyond is charged too
            await self._meter.give_back(self._tenant, self._most, unused)


def checked(given: dict[str, Any]) -> Quotas:
    """Quotas of a body that was held against its schema: 0 takes a limit away."""
    return Quotas(**{name: value or None for name, value in given.items()})
