"""Clients by the hundred in one event loop: nothing of HTTP but what a load needs, so that what is
measured is the server's."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httptools

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    seconds: float  # from before the request was sent
    headers: dict[str, str]
    body: bytes
    waited: float = 0.0  # from when it was due until it was sent


class Lost(Exception):
    """The connection ended before the answer did."""


def request(path: str, body: Any = None, method: str | None = None, close: bool = False) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(content)}\r\n"
    head += "content-type: application/json\r\n" if content else ""
    head += "connection: close\r\n" if close else ""
    return f"{head}\r\n".encode() + content


def generate(prompt: str, tokens: int, adapter: str | None = None, **more: Any) -> bytes:
    parameters = {"max_new_tokens": tokens, "ignore_eos": True, **more}
    if adapter is not None:
        parameters["adapter_id"] = adapter
    return request("/generate", {"inputs": prompt, "parameters": parameters})


class Client(asyncio.Protocol):
    """One connection, kept while the server keeps it; one request at a time."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None

    async def ask(self, content: bytes) -> Answer:
        """Raises Lost."""
        loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        try:
            if self._transport is None or self._transport.is_closing():
                self._transport, _ = await loop.create_connection(lambda: self, *self.address)
        except OSError as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        self._answer = loop.create_future()
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(content)
        try:
            return await self._answer
        finally:
            self._answer = None

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            said = "the server closed the connection" if error is None else str(error)
            self._answer.set_exception(Lost(f"{type(error).__name__}: {said}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode("latin-1").lower()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        seconds, status = time.perf_counter() - self._began, self._parser.get_status_code()
        if self._headers.get("connection") == "close" and self._transport is not None:
            self._transport.close()
            self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(status, seconds, self._headers, b"".join(self._body)))


@dataclass(slots=True)
class Load:
    """What came of a load: answers by status, and how long each took."""

    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)

    def times(self, status: int) -> list[float]:
        return [answer.seconds for answer in self.answers if answer.status == status]

    def since_due(self, status: int) -> list[float]:
        """With what each waited for its turn to be sent, which a busy machine makes longer."""
        found = [answer for answer in self.answers if answer.status == status]
        return [answer.waited + answer.seconds for answer in found]

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.answers)


async def closed_loop(address: Address, content: bytes, clients: int, seconds: float) -> Load:
    """Clients that each ask again when they are answered, or a moment after they are refused. They
    begin one after another."""
    load, end = Load(seconds), time.perf_counter() + seconds

    async def one(number: int) -> None:
        client = Client(address)
        await asyncio.sleep(number * min(0.05, seconds / 4 / clients))
        while time.perf_counter() < end:
            if await _ask(client, content, load) == 503:
                await asyncio.sleep(0.02)
        await client.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return load


def evenly(rate: float, seconds: float) -> list[float]:
    """The moments of `rate` arrivals a second."""
    return [number / rate for number in range(int(rate * seconds))]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """The same, independent of each other."""
    rng, moment, found = random.Random(seed), 0.0, []
    while (moment := moment + rng.expovariate(rate)) < seconds:
        found.append(moment)
    return found


async def open_loop(
    address: Address, content: bytes, moments: Sequence[float], seconds: float
) -> Load:
    """A request at each of these moments, whether the ones before are answered or not."""
    load, began, tasks = Load(seconds), time.perf_counter(), []
    idle: list[Client] = []

    async def one(due: float) -> None:
        client = idle.pop() if idle else Client(address)
        await _ask(client, content, load, due)
        idle.append(client)

    for moment in moments:
        await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(began + moment)))
    await asyncio.gather(*tasks)
    for client in idle:
        await client.close()
    return load


async def _ask(client: Client, content: bytes, load: Load, due: float | None = None) -> int:
    """The status; 0 where there was no answer."""
    waited = 0.0 if due is None else time.perf_counter() - due
    try:
        load.answers.append(replace(await client.ask(content), waited=waited))
    except Lost as error:
        load.lost[str(error)] += 1
        return 0
    return load.answers[-1].status


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest that `share` of them do not exceed."""
    if not times:
        return math.nan
    return sorted(times)[min(len(times) - 1, math.ceil(share * len(times)) - 1)]
