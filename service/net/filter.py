"""The accept filter from the event loop's side: connections come with the request that they were
held for (csrc/accept.h)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.net.library import BATCH, Counts, Library, Rules, Taken


@dataclass(frozen=True, slots=True)
class Come:
    """What a connection brings: its first bytes, untouched; for how many seconds a head, or a body,
    has been coming that is not whole; whether it is one too many, and has to hear so."""

    content: bytes
    waited: float = 0.0
    full: bool = False


class Filter:
    """Owns `listeners` from its making on. Its thread runs until `end`.

    Raises OSError where it cannot begin: the listeners are still the caller's then.
    """

    def __init__(
        self, library: Library, rules: Rules, counts: Counts, listeners: Sequence[int]
    ) -> None:
        self._library = library
        self.counts = counts
        # The thread uses them until the process ends, where nobody calls `end`.
        for kept in (rules, counts):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        which = (ctypes.c_int * len(listeners))(*listeners)
        self._filter = library.start(rules, counts, which, len(listeners))
        if not self._filter:
            why = ctypes.get_errno()
            raise OSError(why, os.strerror(why))
        self._event: int = library.event(self._filter)
        self._batch = (Taken * BATCH)()
        self._coming: set[asyncio.Task[None]] = set()

    def deliver(self, make: Callable[[Come], asyncio.Protocol]) -> None:
        """From here on, in this loop: each connection to a protocol of its own."""
        self._loop = asyncio.get_running_loop()
        self._make = make
        self._loop.add_reader(self._event, self._take)

    async def stop(self) -> None:
        """Hear who came before this, take no more, and deliver the last."""
        self._library.stop(self._filter)
        self._loop.remove_reader(self._event)
        self._take()
        while self._coming:
            await asyncio.wait(self._coming)

    async def end(self) -> None:
        """After `stop`: wait for who still reads a refusal."""
        await asyncio.to_thread(self._library.end, self._filter)

    def _take(self) -> None:
        batch = self._batch
        while count := self._library.take(self._filter, batch, BATCH):
            for number in range(count):
                one = batch[number]
                content = ctypes.string_at(one.content, one.size) if one.size else b""
                come = Come(content, one.waited, bool(one.full))
                found = socket.socket(one.family, socket.SOCK_STREAM, 0, fileno=one.descriptor)
                task = self._loop.create_task(self._connect(found, come))
                self._coming.add(task)
                task.add_done_callback(self._coming.discard)

    async def _connect(self, found: socket.socket, come: Come) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._make(come), found)
        except OSError:
            found.close()  # its client has gone
