"""Clients by the hundred in one event loop: nothing of HTTP but what a load needs, so that what is
measured is the server's."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    seconds: float  # from before the request was sent
    headers: dict[str, str]
    body: bytes


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


class Client:
    """One connection, kept while the server keeps it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, content: bytes) -> Answer:
        """Raises Lost."""
        began = time.perf_counter()
        try:
            if self._reader is None or self._reader.at_eof():
                await self.close()
                self._reader, self._writer = await asyncio.open_connection(*self.address)
            assert self._writer is not None
            self._writer.write(content)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            body = await self._body(headers)
        except (OSError, EOFError) as error:
            await self.close()
            raise Lost(f"{type(error).__name__}: {error}") from error
        answer = Answer(int(first.split()[1]), time.perf_counter() - began, headers, body)
        if headers.get("connection") == "close":
            await self.close()
        return answer

    async def _body(self, headers: dict[str, str]) -> bytes:
        assert self._reader is not None
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(headers.get("content-length", "0")))
        pieces = []
        while size := int(await self._reader.readline(), 16):
            pieces.append(await self._reader.readexactly(size))
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return b"".join(pieces)

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@dataclass(slots=True)
class Load:
    """What came of a load: answers by status, and how long each took."""

    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)

    def times(self, status: int) -> list[float]:
        return [answer.seconds for answer in self.answers if answer.status == status]

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.answers)


async def closed_loop(address: Address, content: bytes, clients: int, seconds: float) -> Load:
    """Clients that each ask again when they are answered. They begin one after another."""
    load, end = Load(seconds), time.perf_counter() + seconds

    async def one(number: int) -> None:
        client = Client(address)
        await asyncio.sleep(number * min(0.05, seconds / 4 / clients))
        while time.perf_counter() < end:
            await _ask(client, content, load)
        await client.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return load


async def open_loop(address: Address, content: bytes, rate: float, seconds: float) -> Load:
    """`rate` requests a second at even distances, whether the ones before are answered or not."""
    load, began, tasks = Load(seconds), time.perf_counter(), []
    idle: list[Client] = []

    async def one() -> None:
        client = idle.pop() if idle else Client(address)
        await _ask(client, content, load)
        idle.append(client)

    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)
    for client in idle:
        await client.close()
    return load


async def _ask(client: Client, content: bytes, load: Load) -> None:
    try:
        load.answers.append(await client.ask(content))
    except Lost as error:
        load.lost[str(error)] += 1


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest that `share` of them do not exceed."""
    if not times:
        return math.nan
    return sorted(times)[min(len(times) - 1, math.ceil(share * len(times)) - 1)]
