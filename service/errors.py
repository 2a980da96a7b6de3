"""Errors of the serving wing.

ServiceError
├── InvalidRequest   the request cannot be served as it is (422): names the field
├── NotFound         a file or a job is not there (404)
├── WrongState       a job cannot do that now (400)
├── Unauthenticated  no key came, or one that opens nothing (401)
├── Forbidden        the key lacks a scope (403)
├── Overloaded       the server has too much to do (503), with `retry_after` seconds
│   └── ColdLoads    too many adapters are on their way to memory (429): all others are served
├── QuotaExceeded    a tenant's limit (429), with `retry_after` seconds
├── Draining         the server is stopping (503)
├── GenerationFailed  an admitted request could not be computed (500)
├── AdapterLoadFailed  the store or the lowering failed while a request waited (503)
└── EngineFailed     the engine's thread stopped; the process should be restarted (500)
"""

from __future__ import annotations

from collections.abc import Sequence


class ServiceError(Exception):
    """Base of all errors that a request can end with."""


class InvalidRequest(ServiceError):
    """The request cannot be served; `field` names what is wrong."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFound(ServiceError):
    """What was named is not there; `field` says which name."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class WrongState(ServiceError):
    """A job is not in a state for that."""


class Unauthenticated(ServiceError):
    """No API key came, or (`sent`) one that opens nothing."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class Forbidden(ServiceError):
    """The key may not do that: it has none of the scopes `wanted`."""

    def __init__(self, wanted: Sequence[str], given: Sequence[str] = ()) -> None:
        needed = " or ".join(wanted)
        super().__init__(f"this needs the scope {needed}; the key has {', '.join(given) or 'none'}")
        self.wanted = tuple(wanted)


class KeysWanted(Forbidden):
    """The route is off while the server has no API key."""

    def __init__(self, wanted: Sequence[str]) -> None:
        scope = " or ".join(wanted)
        ServiceError.__init__(
            self,
            "this is off while the server has no API key: make one with "
            f"`nibble keys create NAME --scopes {scope}`, or set NIBBLE_ADMIN_KEY, and send it as "
            "`Authorization: Bearer …`",
        )
        self.wanted = tuple(wanted)


class NotTrained(Forbidden):
    """An adapter of this name was uploaded: a training job's result may not take its place."""

    def __init__(self, name: str) -> None:
        ServiceError.__init__(
            self,
            f"adapter {name!r} was not made by a training job, and a new version would serve in "
            "its place: that needs the scope adapters:write; or take another suffix",
        )
        self.wanted = ("adapters:write",)


class Overloaded(ServiceError):
    """The server has too much to do; come back after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ColdLoads(Overloaded):
    """Too many adapters are on their way to memory."""


class QuotaExceeded(ServiceError):
    """A tenant uses as much as it may; come back after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(ServiceError):
    """The server takes no new requests."""


class GenerationFailed(ServiceError):
    """An admitted request could not be computed; others were not touched."""


class AdapterLoadFailed(ServiceError):
    """The adapter of a waiting request could not be brought to its slot."""


class EngineFailed(ServiceError):
    """The engine stopped; nothing more will be served by this process."""
