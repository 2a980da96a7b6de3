"""Server-sent events: what is on the wire, and who cleans up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.api import sse
from service.api.sse import EventReply, encoded
from tests.waiting import LOOP_TIME, simulated


class Wire:
    """The server's side of a connection: what was sent, and when the client goes."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.blocked = False

    async def send(self, message: Any) -> None:
        if self.blocked:
            await asyncio.sleep(3600)
        self.sent.append(message)

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def play(reply: EventReply, wire: Wire) -> None:
    await reply({"type": "http"}, wire.receive, wire.send)


def test_an_event_is_one_line() -> None:
    line = encoded({"text": "a\r\n\u2028b", "n": 1})
    assert line.startswith(b"data:")
    assert line.endswith(b"\n\n")
    assert line.count(b"\n") == 2
    assert json.loads(line[5:]) == {"text": "a\r\n\u2028b", "n": 1}


def test_whole_stream() -> None:
    async def events() -> AsyncIterator[dict[str, int]]:
        yield {"n": 1}
        yield {"n": 2}

    async def run() -> tuple[Wire, int]:
        wire, closed = Wire(), []
        await play(EventReply(events(), lambda: closed.append(1), {"x-a": "b"}), wire)
        return wire, len(closed)

    wire, closed = simulated(run())
    assert wire.body == b'data: {"n": 1}\n\ndata: {"n": 2}\n\n'
    assert closed == 1
    headers = dict(wire.sent[0]["headers"])
    assert headers[b"x-a"] == b"b"
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
    assert wire.sent[-1]["more_body"] is False


def test_a_client_that_goes_ends_it() -> None:
    async def events() -> AsyncIterator[dict[str, int]]:
        yield {"n": 1}
        await asyncio.sleep(3600)

    async def run() -> int:
        wire, closed = Wire(), []
        reply = EventReply(events(), lambda: closed.append(1), {})
        asyncio.get_running_loop().call_later(0.05, wire.gone.set)
        await asyncio.wait_for(play(reply, wire), 10)
        return len(closed)

    assert simulated(run()) == 1


def test_a_client_that_went_before_the_first_event() -> None:
    async def events() -> AsyncIterator[dict[str, int]]:
        await asyncio.sleep(3600)
        yield {}

    async def run() -> int:
        wire, closed = Wire(), []
        wire.gone.set()
        await asyncio.wait_for(play(EventReply(events(), lambda: closed.append(1), {}), wire), 10)
        return len(closed)

    assert simulated(run()) == 1


def test_silence_is_filled_with_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "time", LOOP_TIME)

    async def events() -> AsyncIterator[dict[str, int]]:
        await asyncio.sleep(2.5 * sse.PING_SECONDS)
        yield {"n": 1}

    async def run() -> Wire:
        wire = Wire()
        await play(EventReply(events(), lambda: None, {}), wire)
        return wire

    body = simulated(run()).body
    assert body == b': ping\n\n: ping\n\ndata: {"n": 1}\n\n'
