"""Server-sent events over POST: one `data:` line of JSON per event, until the client goes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PING_SECONDS = 15.0  # of silence; proxies cut quieter connections

_PING = b": ping\n\n"
REF = "#/components/schemas/{model}"
_events: dict[str, type[BaseModel]] = {}  # by their names in OpenAPI


class EventReply(StreamingResponse):
    """Sends `events` as they come. `close()` runs once at the end, whoever ended it, even when
    the first event was never asked for. `ending` is sent after the last event. A client that takes
    nothing is the connection's matter (`service.api.connection`), which says then that it went."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any]],
        close: Callable[[], None],
        headers: Mapping[str, str],
        ending: bytes = b"",
    ) -> None:
        own = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers={**headers, **own})  # type: ignore[arg-type]
        self._events = events
        self._close = close
        self._ending = ending
        self._sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            self._close()
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pinging = asyncio.ensure_future(self._ping(send))
        try:
            async for event in self._events:
                await self._send_chunk(send, encoded(event))
        finally:
            pinging.cancel()
        await send({"type": "http.response.body", "body": self._ending, "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            if time.monotonic() - self._sent >= PING_SECONDS:
                await self._send_chunk(send, _PING)

    async def _send_chunk(self, send: Send, body: bytes) -> None:
        self._sent = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def events_of(event: type[BaseModel], last: str = "") -> dict[str, Any]:
    """OpenAPI's entry for a stream of events whose data is this model as JSON; or `last`, of the
    last one."""
    _events[event.__name__] = event
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": REF.format(model=event.__name__)},
    }
    if last:
        data = {"anyOf": [data, {"type": "string", "const": last}]}
    schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"text/event-stream": {"schema": schema}}


def schemas() -> dict[str, Any]:
    """The components that events refer to: FastAPI knows only models that a route returns whole."""
    wanted = [(event, "serialization") for event in _events.values()]
    _, found = models_json_schema(wanted, ref_template=REF)  # type: ignore[arg-type]
    return dict(found["$defs"])


def encoded(event: Mapping[str, Any]) -> bytes:
    """One event on the wire. JSON escapes every line break, so one line is enough."""
    return b"data: " + json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
