"""The road back: events of one request, from the engine's thread to whoever waits for them."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

from service.engine.request import Event, Finished


class EventStream(Protocol):
    """What a reply reads: a `Stream`, or what watches one."""

    def __aiter__(self) -> AsyncIterator[Event]: ...
    def cancel(self) -> None: ...


class Stream:
    """Iterate it with `async for` in an event loop, or with `iterate()` in a thread; once.

    It ends after the last of the request's n sequences has sent its `Finished`. Where it is not
    `streamed`, an event loop is woken for the first event and for the ends, not for each token.
    """

    def __init__(self, sequences: int, cancel: Callable[[], None], streamed: bool = True) -> None:
        self._open = sequences
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancel = cancel
        self._wake: Callable[[], None] | None = None
        self._wakes = True  # for the next event, whatever it is
        self._streamed = streamed

    def cancel(self) -> None:
        """End what still runs, within one step. Safe to call more than once, from any thread."""
        self._cancel()

    def push(self, event: Event) -> None:
        """Engine thread: one more event."""
        self._events.put(event)
        wake = self._wake
        if wake is not None and (self._wakes or isinstance(event, Finished)):
            wake()
        self._wakes = self._streamed

    def iterate(self, timeout: float | None = None) -> Iterator[Event]:
        """Events as they come; raises queue.Empty when none comes within `timeout` seconds."""
        while self._open:
            yield self._count(self._events.get(timeout=timeout))

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def wake() -> None:
            # The loop may have closed when the client is long gone: then nobody waits.
            if not loop.is_closed():
                loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        while self._open:
            ready.clear()
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                await ready.wait()
                continue
            yield self._count(event)

    def _count(self, event: Event) -> Event:
        self._open -= isinstance(event, Finished)
        return event
