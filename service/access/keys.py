"""API keys: `nbl_<id>_<secret>`, shown once; the catalog keeps the sha-256 of the secret.

The secret has 256 random bits, so nothing shortens guessing it, and one fast hash is as good as a
slow one, which exists for passwords that people choose. A row is never removed: a key that was
revoked stays known, so a server that had keys once never opens by itself.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from adapters.catalog import Catalog
from adapters.room import several
from adapters.tables import api_keys as rows
from adapters.tables import tenants
from service.access.caller import SCOPES, TENANT, Caller, Scope, redacted
from service.config import Settings
from service.errors import InvalidRequest, NotFound, WrongState

TOKEN = re.compile(r"nbl_([0-9a-f]{12})_([0-9a-f]{64})")
KEY_ID = re.compile(r"[0-9a-f]{12}")
NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
DAY = 24 * 3600.0
OVERLAP = DAY  # how long the old key of a rotation still opens
MAX_DAYS = 3650.0

_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()  # compared where an id is unknown


@dataclass(frozen=True, slots=True)
class Key:
    """One row, without what it is compared with. Times are in seconds since the epoch."""

    id: str
    name: str
    tenant: str
    scopes: tuple[Scope, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None
    successor: str | None = None  # the key that it was rotated to
    secret_sha256: str = field(default="", repr=False)

    def state(self, now: float | None = None) -> str:
        """active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        ended = self.expires is not None and self.expires <= (time.time() if now is None else now)
        return "expired" if ended else "active"

    def view(self) -> dict[str, Any]:
        """What may be shown of it, as JSON."""
        return {
            "id": self.id,
            "name": self.name,
            "tenant": self.tenant,
            "scopes": list(self.scopes),
            "state": self.state(),
            "created": self.created,
            "expires": self.expires,
            "revoked": self.revoked,
            "successor": self.successor,
        }

    @property
    def caller(self) -> Caller:
        return Caller(self.tenant, frozenset(self.scopes), self.id)


@dataclass(frozen=True, slots=True)
class Issued:
    """A new key; `token` is its whole text, which nobody can be shown again."""

    key: Key
    token: str = field(repr=False)

    def view(self) -> dict[str, Any]:
        return self.key.view() | {"key": self.token}


class Keys:
    """The keys of one catalog. Thread-safe; raises StoreUnavailable, StoreFull."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def create(
        self, name: str, tenant: str, scopes: Iterable[str], days: float | None = None
    ) -> Issued:
        """A new key, and its tenant where there is none yet. `days`: None never expires.

        Raises InvalidRequest.
        """
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"{name[:80]!r}: a key's name has 1 to 64 characters", "name")
        check_tenant(tenant)
        granted = check_scopes(scopes)
        if days is not None and not 0 < days <= MAX_DAYS:
            raise InvalidRequest(f"{days:g}: more than 0 and at most {MAX_DAYS:g}", "days")
        now = time.time()
        with self._catalog.writing() as connection:
            known = sa.select(tenants.c.name).where(tenants.c.name == tenant)
            if connection.execute(known).first() is None:
                connection.execute(sa.insert(tenants).values(name=tenant, created=now))
            expires = None if days is None else now + days * DAY
            return _insert(connection, name, tenant, granted, now, expires)

    def find(self, key_id: str) -> Key | None:
        """The key of an id, whatever became of it."""
        with self._catalog.reading() as connection:
            row = connection.execute(sa.select(rows).where(rows.c.id == key_id)).first()
        return None if row is None else _key(row)

    def list(self) -> list[Key]:
        """Every key that there ever was, oldest first."""
        with self._catalog.reading() as connection:
            found = connection.execute(sa.select(rows).order_by(rows.c.created, rows.c.id))
            return [_key(row) for row in found]

    def several(self) -> bool:
        """Whether more than one tenant ever had one."""
        with self._catalog.reading() as connection:
            return several(connection)

    def any(self) -> bool:
        """Whether there ever was one."""
        with self._catalog.reading() as connection:
            return connection.execute(sa.select(rows.c.id).limit(1)).first() is not None

    def rotate(self, key_id: str, overlap: float = OVERLAP) -> Issued:
        """A new key in place of one, which opens for `overlap` seconds more and then no longer.

        The new one lives as long as the old one was made for. Raises NotFound, WrongState.
        """
        now = time.time()
        with self._catalog.writing() as connection:
            old = self._living(connection, key_id, "rotated")
            expires = None if old.expires is None else now + (old.expires - old.created)
            made = _insert(connection, old.name, old.tenant, old.scopes, now, expires)
            end = now + overlap if old.expires is None else min(now + overlap, old.expires)
            change = sa.update(rows).where(rows.c.id == key_id)
            connection.execute(change.values(expires=end, successor=made.key.id))
        return made

    def revoke(self, key_id: str) -> Key:
        """From now on it opens nothing. Raises NotFound, WrongState."""
        with self._catalog.writing() as connection:
            self._living(connection, key_id, "revoked")
            mine = rows.c.id == key_id
            connection.execute(sa.update(rows).where(mine).values(revoked=time.time()))
            return _key(connection.execute(sa.select(rows).where(mine)).one())

    def _living(self, connection: sa.Connection, key_id: str, done: str) -> Key:
        query = sa.select(rows).where(rows.c.id == key_id).with_for_update()
        row = connection.execute(query).first() if KEY_ID.fullmatch(key_id) else None
        if row is None:
            raise NotFound(f"key {redacted(key_id)[:80]!r} does not exist", "key_id")
        found = _key(row)
        if found.state() != "active":
            raise WrongState(f"key {key_id} is {found.state()}: only an active one is {done}")
        if done == "rotated" and found.successor is not None:
            raise WrongState(f"key {key_id} was rotated to {found.successor}: rotate that one")
        return found


@contextmanager
def opened(settings: Settings) -> Iterator[Keys]:
    """The keys under `settings`, for a command. Raises StoreUnavailable."""
    if settings.catalog.startswith("sqlite:"):
        settings.home.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(settings.catalog)
    try:
        yield Keys(catalog)
    finally:
        catalog.close()


def opens(key: Key | None, secret: str) -> bool:
    """Whether this secret is the key's, and the key alive. Takes as long where there is no key."""
    given = hashlib.sha256(secret.encode()).hexdigest()
    right = hmac.compare_digest(given, key.secret_sha256 if key else _NOBODY)
    return right and key is not None and key.state() == "active"


def check_scopes(scopes: Iterable[str]) -> tuple[Scope, ...]:
    """The scopes, in one order. Raises InvalidRequest."""
    given = set(scopes)
    if unknown := sorted(given.difference(SCOPES)):
        raise InvalidRequest(
            f"{unknown[0][:80]!r} is no scope; there are {', '.join(SCOPES)}", "scopes"
        )
    if not given:
        raise InvalidRequest(f"a key needs a scope; there are {', '.join(SCOPES)}", "scopes")
    return tuple(scope for scope in SCOPES if scope in given)


def check_tenant(name: str, field: str = "tenant") -> str:
    """The name itself, when it is one. Raises InvalidRequest."""
    if not TENANT.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r}, expected 1 to 64 of a-z, 0-9, '_', '-', beginning with a letter or a "
            "digit",
            field,
        )
    return name


def _insert(
    connection: sa.Connection,
    name: str,
    tenant: str,
    scopes: tuple[Scope, ...],
    now: float,
    expires: float | None,
) -> Issued:
    key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    key = Key(key_id, name, tenant, scopes, now, expires, secret_sha256=hashed)
    connection.execute(
        sa.insert(rows).values(
            id=key_id,
            name=name,
            tenant=tenant,
            scopes=" ".join(scopes),
            secret_sha256=hashed,
            created=now,
            expires=expires,
        )
    )
    return Issued(key, f"nbl_{key_id}_{secret}")


def _key(row: Any) -> Key:
    known: dict[str, Scope] = {scope: scope for scope in SCOPES}
    return Key(
        row.id,
        row.name,
        row.tenant,
        tuple(known[one] for one in row.scopes.split() if one in known),
        row.created,
        row.expires,
        row.revoked,
        row.successor,
        row.secret_sha256,
    )
