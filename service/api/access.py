"""What each route asks of a key: `needs` says it, `Guarded` holds to it before a body is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from service.access.caller import SCOPES, Caller
from service.access.caller import Scope as KeyScope
from service.api.deps import Desk, loaded

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

SCHEME = "api_key"  # in OpenAPI


def needs(*scopes: KeyScope) -> Callable[[Endpoint], Endpoint]:
    """The endpoint is for who has one of these scopes."""
    if unknown := set(scopes).difference(SCOPES):
        raise ValueError(f"{sorted(unknown)} are no scopes")

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.__dict__["scopes"] = scopes
        return endpoint

    return declare


any_key = needs(*SCOPES)  # whoever has a key
open_to_all = needs()  # and who has none


class Guarded(APIRoute):
    """A route that says who may use it. One that says nothing cannot be made."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **rest: Any) -> None:
        declared = getattr(endpoint, "scopes", None)
        if declared is None:
            raise ValueError(f"{path}: say who may use it: @needs(…), @any_key or @open_to_all")
        self.scopes: tuple[KeyScope, ...] = declared
        if declared:
            security = {"security": [{}, {SCHEME: list(declared)}]}
            rest["openapi_extra"] = security | (rest.get("openapi_extra") or {})
        super().__init__(path, endpoint, **rest)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.scopes and scope["method"] in (self.methods or ()):
            await self._admit(scope)
        await super().handle(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        desk: Desk = scope["app"].state.desk
        gate = loaded(desk).gate
        caller = await gate.caller(Headers(scope=scope).get("authorization"))
        scope["caller"] = caller
        if caller.key is not None:
            structlog.contextvars.bind_contextvars(key=caller.key, tenant=caller.tenant)
        caller.check(*self.scopes)


def caller_of(request: Request) -> Caller:
    """Who asks; of a route that is guarded."""
    found: Caller = request.scope["caller"]
    return found


def described(api: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with what `security` of its operations means."""
    api.setdefault("components", {})["securitySchemes"] = {
        SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "nbl_<id>_<secret>",
            "description": "An API key, where the server has any; the names are scopes, of which "
            "it needs one.",
        }
    }
    return api
