"""A server in a process of its own: started, waited for, asked over HTTP, and killed."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STARTING_SECONDS = 600.0
ANSWER_SECONDS = 600.0
LOOK_SECONDS = 0.02  # between two looks whether a server is ready


class ServerFailed(Exception):
    """A server did not start, or answered with something else than tokens."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready."""

    url: str
    pid: int
    seconds: float  # from its start until it was ready


@contextmanager
def launched(
    command: Sequence[str],
    log: Path,
    url_of: Callable[[str], str | None],
    health: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Start `command`, both its outputs in `log`; ready once `health` answers 200. Killed after.

    `url_of` finds the address in the text of the log; None: not there yet.
    """
    began = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, **(environment or {})},
        )
    try:
        url = wait_until_ready(process, log, url_of, health)
        yield Running(url, process.pid, time.perf_counter() - began)
    finally:
        process.kill()  # what it trains goes with it
        process.wait()


@contextmanager
def nibble_server(
    model: Path | str, home: Path, flags: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Running]:
    """`nibble serve` on a free port, without the adapters that come along; its base is `base`."""
    command = [sys.executable, "-m", "service.cli", "serve", "--base", str(model), "--port", "0"]
    command += ["--home", str(home), "--adapters", "none", "--log-format", "json"]
    command += ["--served-names", "base", *flags]
    with launched(command, home / "log", nibble_address, "/ready", environment) as running:
        yield running


def nibble_address(log: str) -> str | None:
    """Where `nibble serve` listens, as its log says."""
    found = re.search(r'"url": "(http[^"]+)"', log)
    return found[1] if found else None


def wait_until_ready(
    process: subprocess.Popen[bytes],
    log: Path,
    url_of: Callable[[str], str | None],
    health: str,
) -> str:
    """Its address, once it is ready. Raises ServerFailed with the end of its log."""
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end and process.poll() is None:
        url = url_of(log.read_text(errors="replace"))
        if url is not None and _is_ready(url, health):
            return url
        time.sleep(LOOK_SECONDS)
    ended = f" (status {process.returncode})" if process.returncode is not None else ""
    raise ServerFailed(
        f"the server did not start{ended}: {log.read_text(errors='replace')[-2000:]}"
    )


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def token_times(
    url: str, path: str, body: Mapping[str, Any], tokens: Callable[[Any], int]
) -> list[float]:
    """When each token of a streamed answer came; `tokens` counts those of one event.

    The standard library's client: it costs little beside the servers that are measured.
    """
    connection = _connection(url, ANSWER_SECONDS)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise ServerFailed(f"POST {path} gave {reply.status}: {reply.read()[:1000]!r}")
        return [at for at, event in _events(reply) for _ in range(tokens(event))]
    finally:
        connection.close()


def _events(reply: HTTPResponse) -> Iterator[tuple[float, Any]]:
    for line in reply:
        if line.startswith(b"data: {"):
            at, event = time.perf_counter(), json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise ServerFailed(f"the server said in its stream: {event['error']}")
            yield at, event


def _is_ready(url: str, health: str) -> bool:
    with closing(_connection(url, 5.0)) as connection, suppress(OSError, HTTPException):
        connection.request("GET", health)
        return connection.getresponse().status == 200
    return False


def _connection(url: str, seconds: float) -> HTTPConnection:
    where = urlsplit(url)
    return HTTPConnection(where.hostname or "", where.port, timeout=seconds)
