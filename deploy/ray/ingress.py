"""What callers meet: who they are and which adapter they mean is found out here, by the server's
own gate and store; what they get comes from a replica, message by message.

A replica that dies takes nobody's request along in silence: where nothing was sent yet and asking
twice does no harm another replica is asked, else the reply says so. A stream gets it as its last
event, in the words of its skin.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import structlog
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import AdapterError
from adapters.store import AdapterStore
from deploy.ray.fleet import Flags, ingress_settings
from deploy.ray.loopback import listen_on_loopback
from service.access.audit import AuditLog
from service.access.caller import Caller
from service.access.gate import Gate
from service.access.keys import Keys
from service.api.access import Guarded
from service.api.door import Door
from service.api.errors import Refused, failure
from service.api.openai_errors import openai_envelope, speaks_openai
from service.api.sse import encoded
from service.app import body_bounds, routers
from service.errors import Forbidden, Overloaded, ServiceError
from service.log import configure_logging
from service.tracing.trace import Untraced

ASKED = 3  # replicas, for one request
LARGE_AT_ONCE = 4  # bodies of more than `max_body_bytes`: they pass through this memory
ID = 32  # hex digits of a digest that name an adapter to the router
ONCE = frozenset({"/feedback"})  # asks for inference, yet asking twice would count twice
PASSED = frozenset(
    {"type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers"}
    | {"client", "server"}
)

logger = structlog.get_logger("nibble.ingress")


class ReplicaLost(ServiceError):
    """The replica that had the request is gone."""


class Ingress:
    """Ray Serve calls `__serve_build_asgi_app__` once, in the process that takes requests."""

    def __init__(self, replicas: DeploymentHandle, flags: Flags) -> None:
        listen_on_loopback()
        settings = ingress_settings(flags)
        configure_logging(settings.log_level, settings.log_format)
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._routes = [route for router in routers(settings) for route in router.routes]
        self._store = AdapterStore(
            settings.blobs, settings.catalog, cache=settings.home / "ingress"
        )
        key = settings.admin_key.get_secret_value() if settings.admin_key else None
        self._gate = Gate(Keys(self._store.catalog), key, local=settings.local)
        self._audit = AuditLog(settings.home / "ingress" / "audit", settings.max_audit_bytes)
        self._bounds = body_bounds(settings)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._base_names = frozenset(settings.base_names)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Door(self._answer, self._bounds, Untraced())

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            self._audit.close()
            self._store.close()
            return
        if scope["path"] == "/metrics":
            reason = "each replica has figures of its own: see metrics_port in docs/howto/fleet.md"
            raise Refused(404, "not_found", reason)
        route = self._route(scope)
        caller = await self._admit(scope, route)
        large = self._bounds.of(scope) > self._bounds.max_body_bytes
        async with self._large if large else nullcontext():
            body = await _whole(receive)
            model = await asyncio.to_thread(self._home, scope, caller, body)
            await self._forward(scope, body, model, _repeatable(scope, route), send)

    def _route(self, scope: Scope) -> Guarded | None:
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL and isinstance(route, Guarded):
                return route
        return None

    async def _admit(self, scope: Scope, route: Guarded | None) -> Caller:
        """Raises Unauthenticated, Forbidden. The replica asks again, and counts."""
        if route is None or not route.scopes:
            return Caller(scopes=frozenset())
        caller = await self._gate.caller(Headers(scope=scope).get("authorization"))
        try:
            route.check(caller)
        except Forbidden:  # no replica hears of it
            self._audit.note(
                f"{scope['method']} {route.path}",
                request=scope["request_id"],
                tenant=caller.tenant,
                key=caller.key,
                status=403,
            )
            raise
        return caller

    def _home(self, scope: Scope, caller: Caller, body: bytes) -> str:
        """The router's name for the adapter that is asked for, empty for the base. A sum has one
        by its text, and so has what the replica will refuse."""
        wanted = _named(scope, body)
        if wanted is None or wanted in self._base_names:
            return ""
        try:
            return self._store.of(caller.tenant).resolve(wanted).digest[:ID]
        except AdapterError:
            text = f"{caller.tenant} {wanted}".encode()
            return hashlib.blake2b(text, digest_size=ID // 2).hexdigest()

    async def _forward(
        self, scope: Scope, body: bytes, model: str, repeatable: bool, send: Send
    ) -> None:
        told = {name: scope[name] for name in PASSED if name in scope}
        for asked in range(1, ASKED + 1):
            reply = _Reply(scope, send)
            try:
                await self._pass_on(told, body, model, reply)
                return
            except BackPressureError as error:
                raise Overloaded("every replica is full, and so is the queue for them") from error
            except RayServeException as error:
                raise Overloaded("there is no replica that takes requests now") from error
            except RayActorError as error:
                logger.warning("replica lost", path=scope["path"], begun=reply.begun, asked=asked)
                if reply.begun:
                    await reply.break_off(_lost())
                    return
                if not repeatable or asked == ASKED:
                    raise _lost() from error

    async def _pass_on(
        self, told: Mapping[str, Any], body: bytes, model: str, reply: _Reply
    ) -> None:
        asked = self._replicas.options(multiplexed_model_id=model) if model else self._replicas
        messages = asked.remote(dict(told), body)
        try:
            async for group in messages:
                for message in group:
                    await reply.send(message)
        except asyncio.CancelledError:  # the client is gone
            messages.cancel()
            raise


class _Reply:
    """A replica's messages on their way out. The head waits for the first byte behind it: until
    then another replica may still answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._head: Message | None = None
        self._events = False
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            return
        if self._head is not None:
            # Under the replica's id: feedback and its log know the request by that.
            known = Headers(raw=self._head["headers"]).get("x-request-id")
            self._scope["request_id"] = known or self._scope["request_id"]
            self.begun = True
            self._events = _is_stream(self._head)
            await self._send(self._head)
            self._head = None
        await self._send(message)

    async def break_off(self, error: ReplicaLost) -> None:
        """Say so in a stream of events; of anything else cut the connection: half an answer must
        not look like a whole one."""
        if not self._events:
            raise error
        event = encoded(_as_event(error, self._scope))
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _lost() -> ReplicaLost:
    return ReplicaLost("the replica that had this request is gone; send the request again")


def _as_event(error: ReplicaLost, scope: Scope) -> Mapping[str, Any]:
    found = failure(error)
    if speaks_openai(scope["path"]):
        return openai_envelope(found.status, found.error_type, found.message, found.field)
    return found.envelope(scope["request_id"])


def _is_stream(head: Message) -> bool:
    kind = Headers(raw=head["headers"]).get("content-type", "")
    return kind.startswith("text/event-stream")


def _repeatable(scope: Scope, route: Guarded | None) -> bool:
    """Whether asking a second replica does no harm if the first had begun."""
    if scope["method"] in ("GET", "HEAD"):
        return True
    return route is not None and "infer" in route.scopes and scope["path"] not in ONCE


def _named(scope: Scope, body: bytes) -> str | None:
    """The adapter that a request names, before anybody has checked it: `adapter_id`, in
    `parameters` or not, of our own routes and TGI's, and OpenAI's `model`."""
    if scope["method"] != "POST" or body.lstrip()[:1] != b"{":
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    parameters = fields.get("parameters")
    inner = parameters if isinstance(parameters, dict) else {}
    for wanted in (inner.get("adapter_id"), fields.get("adapter_id"), fields.get("model")):
        if isinstance(wanted, str):
            return wanted
    return None


async def _whole(receive: Receive) -> bytes:
    """The body, whose size and time the door bounds."""
    pieces, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise asyncio.CancelledError  # the client is gone
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
