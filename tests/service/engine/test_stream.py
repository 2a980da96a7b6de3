"""Who reads a reply as it comes is woken for each event; who wants it whole, for its ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from service.engine.request import Event, Finished, Token
from service.engine.stream import Stream
from tests.waiting import PATIENCE


def token(index: int = 0, last: bool = False) -> Token:
    return Token(index, 7, "x", 0.0, last=last)


def end(index: int = 0) -> Finished:
    return Finished(index, "length", "x", prompt_tokens=1, cached_tokens=0, generated_tokens=1)


async def read(stream: Stream, said: Sequence[Event]) -> tuple[list[Event], int]:
    """What came of what another thread says, and how often the event loop was woken for it."""
    loop = asyncio.get_running_loop()
    wakes, wake = 0, loop.call_soon_threadsafe

    def counted(*args: Any, **rest: Any) -> asyncio.Handle:
        nonlocal wakes
        wakes += 1
        return wake(*args, **rest)

    reading = asyncio.ensure_future(_all(stream))
    await asyncio.sleep(0)  # it waits
    loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
    engine = threading.Thread(target=lambda: [stream.push(event) for event in said])
    engine.start()
    found = await asyncio.wait_for(reading, PATIENCE)
    engine.join()
    return found, wakes


async def _all(stream: Stream) -> list[Event]:
    return [event async for event in stream]


@pytest.mark.parametrize(("streamed", "wakes"), [(True, 5), (False, 2)])
def test_the_loop_is_woken_for_what_is_wanted(streamed: bool, wakes: int) -> None:
    said = [token(), token(), token(), token(last=True), end()]
    assert asyncio.run(read(Stream(1, lambda: None, streamed), said)) == (said, wakes)


def test_each_end_of_several_sequences_is_told() -> None:
    said = [token(0, True), end(0), token(1, True), end(1), token(2), token(2, True), end(2)]
    assert asyncio.run(read(Stream(3, lambda: None, streamed=False), said)) == (said, 4)
