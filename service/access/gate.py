"""The gate: from what a request sends to who asks. No other place looks at a key."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections import OrderedDict
from typing import Any

from service.access.caller import ANYBODY, LOCAL, SCOPES, Caller
from service.access.keys import TOKEN, Key, Keys, opens
from service.errors import Unauthenticated

# A key that another process has revoked opens for so long at most.
SECONDS = 0.5
REMEMBERED = 4096  # keys
# Ids that opened nothing lately: so many are looked up at once. Who guesses then waits for himself,
# and not the holders of keys for him. (There is nothing to guess: a secret has 256 random bits.)
STRANGERS = 2

_MISSING = "send an API key: `Authorization: Bearer nbl_…`"
_WRONG = "this API key opens nothing here: it is unknown, expired or revoked"


class Gate:
    """Who a request comes from. One event loop only; the catalog is asked in threads."""

    def __init__(self, keys: Keys, admin_key: str | None = None, *, local: bool = True) -> None:
        """`admin_key`: the operator's, from outside the catalog; every scope, tenant `default`.
        `local`: only this machine reaches the server; says what is allowed while there is no key.
        """
        self.keys = keys
        self._admin = None if admin_key is None else _hashed(admin_key)
        self._without = LOCAL if local else ANYBODY
        self._known: OrderedDict[str, tuple[float, Key]] = OrderedDict()
        self._strange: OrderedDict[str, float] = OrderedDict()  # ids without a key, until when
        self._strangers = asyncio.Semaphore(STRANGERS)
        self._keyless = admin_key is None
        self._looked = -math.inf
        self.several = False  # whether more than one tenant has had a key

    async def caller(self, authorization: str | None) -> Caller:
        """Raises Unauthenticated, StoreUnavailable."""
        if await self._open():
            return self._without
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Unauthenticated(_MISSING, sent=False)
        return await self._holder(given.strip())

    def forget(self, key_id: str) -> None:
        """Ask the catalog anew when this key comes next."""
        self._known.pop(key_id, None)
        self._strange.pop(key_id, None)

    async def _open(self) -> bool:
        """Whether there has never been a key. Once there was one, that is not asked again."""
        if self._keyless and time.monotonic() - self._looked >= SECONDS:
            # Noted once the answer is there: nobody may pass on one that is still on its way.
            asked = time.monotonic()
            self._keyless = not await asyncio.to_thread(self.keys.any)
            self._looked = asked
        return self._keyless

    async def _holder(self, given: str) -> Caller:
        # Always both: which of them a text might be shows in no time that it takes.
        operator = self._admin is not None and hmac.compare_digest(_hashed(given), self._admin)
        match = TOKEN.fullmatch(given)
        key_id, secret = match.groups() if match else ("", given)
        key = await self._find(key_id) if match else None
        if opens(key, secret) and key is not None:
            return key.caller
        if operator:
            return Caller(scopes=frozenset(SCOPES), key="admin_key")
        raise Unauthenticated(_WRONG)

    async def _find(self, key_id: str) -> Key | None:
        known = self._known.get(key_id)
        if known is None:
            async with self._strangers:
                return await self._ask_for_stranger(key_id)
        until, key = known
        return key if time.monotonic() < until else await self._ask(key_id)

    async def _ask_for_stranger(self, key_id: str) -> Key | None:
        if time.monotonic() < self._strange.get(key_id, -math.inf):
            return None
        asked = time.monotonic()
        key = await self._ask(key_id)
        if key is None:
            self._strange[key_id] = asked + SECONDS
            _bound(self._strange, key_id)
        return key

    async def _ask(self, key_id: str) -> Key | None:
        asked = time.monotonic()
        key = await asyncio.to_thread(self._look, key_id)
        if key is None:
            self._known.pop(key_id, None)
        else:
            self._known[key_id] = (asked + SECONDS, key)
            _bound(self._known, key_id)
        return key

    def _look(self, key_id: str) -> Key | None:
        self.several = self.several or self.keys.several()
        return self.keys.find(key_id)


def _bound(remembered: OrderedDict[str, Any], key_id: str) -> None:
    """The newest is last; the oldest of too many is forgotten."""
    remembered.move_to_end(key_id)
    if len(remembered) > REMEMBERED:
        remembered.popitem(last=False)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
