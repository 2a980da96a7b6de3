"""Clients that stall, a thousand in one thread, for as little as they can cost: one `epoll`, no
tasks, so that what others wait for is the server's doing.

Of sixty-four, twenty-five never end the head of a request; twenty never end its body, and eighteen
stop after a first piece that would pay for minutes; one reads nothing of the replies that it asked
for, more than the system keeps (few: to make those replies is work, and no stall).
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from service.api.console import BUILT
from tests.reliability.clients import Address, request

DRIP_SECONDS = 1.0  # between two bytes of who sends slowly
FAST = 100_000  # bytes at once, of a body that then stops
REPLIES_BYTES = 5 << 20  # asked for by who reads nothing; the system keeps some of them
COME_SECONDS = 4.0
NICE = 19  # what they compute must not keep the server or its honest clients waiting
OF_64 = (0,) * 25 + (1,) * 20 + (2,) * 18 + (3,)
KINDS = ("head", "body", "fast body", "reader")


@dataclass(slots=True)
class Stalled:
    """How long each was borne, by what it did; inf: until it was no longer watched."""

    borne: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: float = 0.0  # of their own process

    @property
    def longest(self) -> float:
        return max(max(times) for times in self.borne.values())

    def __str__(self) -> str:
        kinds = (f"{kind} {len(t)}, {max(t):.1f} s" for kind, t in self.borne.items())
        return "; ".join(kinds)


def one_large_reply() -> bytes:
    """A request for the largest file of the console."""
    return request(f"/console/{_largest().name}")


def large_replies() -> bytes:
    """Requests for as much as the system does not keep for a client."""
    return one_large_reply() * -(-REPLIES_BYTES // _largest().stat().st_size)


def _largest() -> Path:
    return max(BUILT.glob("console/*"), key=lambda path: path.stat().st_size)


def first_bytes(large: bytes) -> dict[str, bytes]:
    """What each kind sends at once. Readers ask for what is `large`."""
    post = b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    return {
        "head": post + b"x-a: ",
        "body": post + b"content-length: 100000\r\n\r\n",
        "fast body": post + b"content-length: %d\r\n\r\n" % (2 * FAST) + b"a" * FAST,
        "reader": large,
    }


def stall(
    address: Address, clients: int, patience: float, large: bytes, come: float = COME_SECONDS
) -> Stalled:
    """They come at even distances in `come` seconds. Returns when each was cut off."""
    kinds = [KINDS[OF_64[number * 5 % 64]] for number in range(clients)]
    return Crowd(address, patience, first_bytes(large)).run(kinds, come)


def stalling(address: Address, clients: int) -> Stalled:
    """In a process of its own."""
    os.nice(NICE)
    before = time.process_time()
    found = stall(address, clients, 60, large_replies())
    found.cpu_seconds = time.process_time() - before
    return found


class Crowd:
    """Stalled clients, and what each does next."""

    def __init__(self, address: Address, patience: float, first: dict[str, bytes]) -> None:
        self.address = address
        self.patience = patience
        self.first = first
        self.found = Stalled()
        self.poll = select.epoll()
        self._here: dict[int, _Client] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._left = 0

    def run(self, kinds: list[str], come: float) -> Stalled:
        began = time.monotonic()
        for number, kind in enumerate(kinds):
            self.at(began + come * number / len(kinds), _Client(self, kind).come)
        self._left = len(kinds)
        while self._left:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else 1.0
            for descriptor, event in self.poll.poll(wait):
                self._here[descriptor].happened(event)
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()
        self.poll.close()
        return self.found

    def at(self, moment: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._due, (moment, self._number, what))

    def enter(self, client: _Client) -> None:
        self._here[client.socket.fileno()] = client
        self.poll.register(client.socket, select.EPOLLOUT)

    def leave(self, client: _Client, borne: float) -> None:
        self._left -= 1
        del self._here[client.socket.fileno()]
        self.found.borne.setdefault(client.kind, []).append(borne)


class _Client:
    def __init__(self, crowd: Crowd, kind: str) -> None:
        self.crowd = crowd
        self.kind = kind
        self.unsent = memoryview(crowd.first[kind])
        self.began = 0.0
        self.gone = False

    def come(self) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if self.kind == "reader":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.began = time.monotonic()
        refused = self.socket.connect_ex(self.crowd.address)
        if refused not in (0, errno.EINPROGRESS):
            raise OSError(refused, os.strerror(refused))
        self.crowd.enter(self)
        self.crowd.at(self.began + self.crowd.patience, self._give_up)

    def happened(self, event: int) -> None:
        """Errors first: a reader is told of nothing else."""
        if event & (select.EPOLLERR | select.EPOLLHUP):
            self._leave(time.monotonic() - self.began)
        elif event & select.EPOLLIN:
            self._read()
        elif self.unsent:
            self._send()

    def _send(self) -> None:
        try:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._leave(time.monotonic() - self.began)
            return
        if self.unsent:
            return
        # A reader looks for errors only, without reading a byte of what has come.
        self.crowd.poll.modify(self.socket, 0 if self.kind == "reader" else select.EPOLLIN)
        if self.kind in ("head", "body"):
            self.crowd.at(time.monotonic() + DRIP_SECONDS, self._drip)

    def _drip(self) -> None:
        if self.gone:
            return
        with contextlib.suppress(OSError):  # that it has gone is seen where it is read
            self.socket.send(b"a")
        self.crowd.at(time.monotonic() + DRIP_SECONDS, self._drip)

    def _read(self) -> None:
        """Until the server has said no, and has gone."""
        try:
            if self.socket.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._leave(time.monotonic() - self.began)

    def _give_up(self) -> None:
        if not self.gone:
            self._leave(float("inf"))

    def _leave(self, borne: float) -> None:
        self.gone = True
        self.crowd.leave(self, borne)
        self.socket.close()
