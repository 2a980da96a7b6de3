"""A server with few descriptors, and more clients than these: a process of its own."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys

from fastapi import FastAPI

from tests.service.api.conftest import Running, until

WHOLE = b"GET /here HTTP/1.1\r\nHost: x\r\n\r\n"


def hears(connection: socket.socket) -> bool:
    came = b""
    while b"here" not in came and (piece := connection.recv(4096)):
        came += piece
    return b"here" in came


def main() -> None:
    app = FastAPI()

    @app.get("/here")
    async def here() -> str:
        return "here"

    running = Running(app)
    with socket.create_connection(running.address) as first:
        first.sendall(WHOLE)
        assert hears(first)
        clients = [socket.socket() for _ in range(20)]
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, used + 5))
        for client in clients:
            client.connect(running.address)
            client.sendall(WHOLE)
        http = running.server.config.http
        until(lambda: http.counts.starved > 0)  # type: ignore[union-attr]
        first.sendall(WHOLE)
        assert hears(first), "who is inside waits for nobody's descriptor"
        for client in clients:
            assert hears(client)
            client.close()
        asyncio.run(asyncio.sleep(1.2))  # the log's line
    running.stop()


if __name__ == "__main__":
    main()
    sys.exit(0)
