"""Who asks: a tenant, and the scopes of the key that was sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from adapters.manifest import DEFAULT_TENANT
from service.errors import Forbidden

Scope = Literal["infer", "adapters:read", "adapters:write", "rag", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
SECRET = re.compile(r"(nbl_[0-9a-f]{12}_)[0-9a-f]+")
TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # also a directory's name (service.retrieval)


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's credential. `key` names it in logs: a key's id, `admin_key`, or nothing."""

    tenant: str = DEFAULT_TENANT
    scopes: frozenset[Scope] = frozenset(SCOPES)
    key: str | None = None

    def may(self, *wanted: Scope) -> bool:
        """Whether one of these scopes is there; `admin` has them all."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(wanted)

    def check(self, *wanted: Scope) -> None:
        """Raises Forbidden, which names what is missing."""
        if not self.may(*wanted):
            raise Forbidden(wanted, tuple(one for one in SCOPES if one in self.scopes))


def redacted(text: str) -> str:
    """Without the secrets of keys: some send one where its id belongs, in a path."""
    return SECRET.sub(r"\1…", text) if "nbl_" in text else text


# Without any key: on this machine's own address whoever asks may do all; behind `--open` all but
# what an operator does.
LOCAL = Caller()
ANYBODY = Caller(scopes=frozenset(SCOPES) - {"admin"})
