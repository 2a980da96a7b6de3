"""What each route asks of a key: `needs` says it, `Guarded` holds to it before a body is read."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from service.access.caller import SCOPES, Caller
from service.access.caller import Scope as KeyScope
from service.access.quotas import Lease
from service.api.deps import Desk, loaded
from service.api.errors import Refused
from service.api.openai_errors import speaks_openai
from service.api.threads import TENANT
from service.api.wire import refusals
from service.errors import Forbidden, KeysWanted

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

SCHEME = "api_key"  # in OpenAPI


def needs(*scopes: KeyScope, queues: bool = False) -> Callable[[Endpoint], Endpoint]:
    """The endpoint is for who has one of these scopes. `queues`: what it does waits for the engine,
    so that it is refused while too many wait, before its body is read."""
    if unknown := set(scopes).difference(SCOPES):
        raise ValueError(f"{sorted(unknown)} are no scopes")

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.__dict__.update(scopes=scopes, queues=queues)
        return endpoint

    return declare


any_key = needs(*SCOPES)  # whoever has a key
open_to_all = needs()  # and who has none


class Guarded(APIRoute):
    """A route that says who may use it. One that says nothing cannot be made."""

    keyless = True  # it takes requests while the server has no key

    def __init__(self, path: str, endpoint: Callable[..., Any], **rest: Any) -> None:
        declared = getattr(endpoint, "scopes", None)
        if declared is None:
            raise ValueError(f"{path}: say who may use it: @needs(…), @any_key or @open_to_all")
        self.scopes: tuple[KeyScope, ...] = declared
        self.queues: bool = endpoint.__dict__["queues"]
        if declared:
            without: list[dict[str, list[str]]] = [{}] if self.keyless else []
            security = {"security": [*without, {SCHEME: list(declared)}]}
            rest["openapi_extra"] = security | (rest.get("openapi_extra") or {})
            if not speaks_openai(path):  # there every 4XX is described
                rest["responses"] = refusals(401, 403, 429) | (rest.get("responses") or {})
        super().__init__(path, endpoint, **rest)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.scopes or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        record = _Record(self, scope, send)
        lease: Lease | None = None
        try:
            lease = await self._admit(scope)
            await super().handle(scope, receive, record.send)
        except Forbidden:
            record.status = 403
            raise
        finally:
            record.write()
            if lease is not None:
                await lease.close()

    def check(self, caller: Caller) -> None:
        """Raises Forbidden."""
        caller.check(*self.scopes)

    async def _admit(self, scope: Scope) -> Lease | None:
        """Raises Unauthenticated, Forbidden, Overloaded, QuotaExceeded. What an operator does is
        not counted, and nothing is where there are no keys."""
        desk: Desk = scope["app"].state.desk
        here = loaded(desk)
        headers = Headers(scope=scope)
        caller = await here.gate.caller(headers.get("authorization"))
        if caller.key is None and desk.settings.local and not desk.settings.open:
            check_host(headers.get("host", ""))
        scope["caller"], scope["said"] = caller, {}
        TENANT.set(caller.tenant)
        if caller.key is not None:
            structlog.contextvars.bind_contextvars(key=caller.key, tenant=caller.tenant)
        self.check(caller)
        if self.queues:
            desk.admission.check_room(caller.tenant)
        counted = caller.key is not None and self.scopes != ("admin",)
        lease = await here.meter.admit(caller.tenant, generates=self.queues) if counted else None
        scope["lease"] = lease
        return lease


class Keyed(Guarded):
    """A route that is off until the server has a key, on this machine's own address too."""

    keyless = False

    def check(self, caller: Caller) -> None:
        if caller.key is None:
            raise KeysWanted(self.scopes)
        super().check(caller)


def check_host(host: str) -> None:
    """Who asks a server of this machine's own, without keys, asks by one of its own names: a page
    whose name was made to lead here (DNS rebinding) would else be at home. Raises Refused."""
    try:
        name = urlsplit(f"//{host}").hostname or ""  # HTTP/1.0 says none
        # Without a dot it is no domain that somebody could have.
        if "." not in name or name.endswith(".localhost") or ip_address(name):
            return
    except ValueError:
        pass
    raise Refused(
        403,
        "forbidden",
        f"{host[:80]!r} is no name of this machine, and there are no keys: ask 127.0.0.1 or "
        "localhost, make a key (`nibble keys create`), or say --open behind a proxy that checks",
    )


def caller_of(request: Request) -> Caller:
    """Who asks; of a route that is guarded."""
    found: Caller = request.scope["caller"]
    return found


class _Record:
    """One request's line for the audit log: what is in its route and in its reply's head."""

    def __init__(self, route: Guarded, scope: Scope, send: Send) -> None:
        self._route, self._scope, self._send = route, scope, send
        self._headers = Headers()
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = Headers(raw=message["headers"])
        await self._send(message)

    def write(self) -> None:
        """Reads are not recorded, but where they were forbidden."""
        caller: Caller | None = self._scope.get("caller")
        done = self._scope["method"] != "GET" and self.status < 400
        if caller is None or not self.status or not (done or self.status == 403):
            return
        serving = self._scope["app"].state.desk.serving
        infers = "infer" in self._route.scopes
        serving.audit.note(
            f"{self._scope['method']} {self._route.path}",
            request=self._scope["request_id"],
            tenant=caller.tenant,
            key=caller.key,
            status=self.status,
            of=self._scope.get("path_params"),
            base=serving.spec.fingerprint if infers else None,
            **{"digest": self._headers.get("x-adapter-digest"), **self._scope["said"]},
        )
