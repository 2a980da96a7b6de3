"""One engine: the whole server in one of Ray's processes, asked by a call and not by a socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.fleet import Flags, claim, ingress_settings, replica_settings
from deploy.ray.loopback import listen_on_loopback

if TYPE_CHECKING:
    from service.api.deps import Desk

LOADING_SECONDS = 0.05
OPEN_ON_ITS_PORT = frozenset({"/metrics", "/health", "/ready"})


class Replica:
    """`answer` is the server's ASGI application, its messages in lists as they came."""

    async def __init__(self, flags: Flags, metrics_port: int | None = None) -> None:
        from service.app import create_app
        from service.log import configure_logging

        listen_on_loopback()
        home, number, self._held = claim(ingress_settings(flags).home)
        settings = replica_settings(flags, home)
        configure_logging(settings.log_level, settings.log_format)
        self._app = create_app(settings)
        self._desk: Desk = self._app.state.desk
        self._answering: set[asyncio.Task[None]] = set()
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        while self._desk.serving is None and self._desk.failure is None:  # noqa: ASYNC110
            await asyncio.sleep(LOADING_SECONDS)
        if self._desk.failure is not None:
            raise RuntimeError(self._desk.failure)
        if metrics_port is not None:
            self._own_port = _listen(self._app, settings.host, metrics_port + number)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """One request. Where the caller goes, the server hears of it as of a closed connection."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        bodies = iter((body,))

        async def receive() -> Message:
            for whole in bodies:
                return {"type": "http.request", "body": whole, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.create_task(_run(self._app, dict(scope), receive, sent.put))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            async for messages in _lists(sent):
                yield messages
            await answering  # what went wrong after the first byte
        finally:
            gone.set()

    def check_health(self) -> None:
        """Ray ends a replica that raises here, and starts another."""
        if self._desk.serving is None or not self._desk.serving.engine.alive:
            raise RuntimeError("the engine failed; the log says why")

    async def __del__(self) -> None:
        """Called once Ray sends nothing more here."""
        with contextlib.suppress(AttributeError):  # it never came so far
            await self._lifespan.__aexit__(None, None, None)


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def _lists(sent: asyncio.Queue[Message | None]) -> AsyncIterator[list[Message]]:
    """What is there, as soon as there is something; None is the end."""
    ended = False
    while not ended:
        found = [await sent.get()]
        while not sent.empty():
            found.append(sent.get_nowait())
        ended = None in found
        if messages := [message for message in found if message is not None]:
            yield messages


def _listen(app: ASGIApp, host: str, port: int) -> asyncio.Task[None]:
    """This replica's own figures, for a Prometheus that knows it."""

    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in OPEN_ON_ITS_PORT:
            await _nothing_here(scope, send)
            return
        await app(scope, receive, send)

    config = uvicorn.Config(
        own, host=host, port=port, lifespan="off", log_config=None, access_log=False, ws="none"
    )
    return asyncio.create_task(uvicorn.Server(config)._serve())  # without signals: they are Ray's


async def _nothing_here(scope: Scope, send: Send) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})
