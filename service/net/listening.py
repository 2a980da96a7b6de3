"""How the server listens: a filter in a thread of its own accepts, and holds a connection until its
first request is there. Who stalls before that costs the event loop nothing.

Where there is no filter (no library, no Linux, TLS) the event loop accepts. `Connection` keeps its
deadlines in either case: the filter knows a connection's first request only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import sys

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from service.api.connection import HEAD_BYTES, HELD_BY_ALL, Connection, stopping
from service.api.door import LINGER_BYTES, LINGER_SECONDS
from service.api.openai_errors import PREFIX
from service.api.shedding import ID, late_reply, tell, whole
from service.net.filter import Come, Filter
from service.net.library import Counts, Library, Reply, Rules, load

HOLD_BYTES = 256 << 10  # of a body; a longer one's connection has to be told how long it may take
DATE = b"@" * 29

logger = structlog.get_logger("nibble.http")


class Listening(uvicorn.Server):
    """uvicorn's server behind the filter, but for who wants none."""

    def __init__(self, config: uvicorn.Config, filtered: bool = True) -> None:
        super().__init__(config)
        http = config.http
        own = isinstance(http, type) and issubclass(http, Connection)
        self.connection: type[Connection] | None = http if own else None  # type: ignore[assignment]
        self._library = load()[0] if filtered else None
        self._filter: Filter | None = None
        self._prefix = secrets.token_hex(5)
        self._late = self._starved = 0  # of what the filter counts: told already

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        bound = self.config.ssl or self.config.uds or self.config.fd is not None or sockets
        if bound or self._library is None or self.connection is None:
            await super().startup(sockets)
            return
        await super().startup([])  # all but to listen
        self.started = False
        try:
            await self._listen(self._library, self.connection)
        except OSError as error:
            logging.getLogger("uvicorn.error").error(error)
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        self._log_started_message(self.servers[0].sockets)
        self.started = True

    async def _listen(self, library: Library, connection: type[Connection]) -> None:
        """Raises OSError."""
        loop, config = asyncio.get_running_loop(), self.config
        server = await loop.create_server(
            self._protocol, config.host, config.port, backlog=config.backlog, start_serving=False
        )
        self.servers = [server]
        listeners = [os.dup(found.fileno()) for found in server.sockets]
        for listener in listeners:
            with socket.socket(fileno=listener) as found:
                found.listen(config.backlog)
                found.detach()
        counts = connection.counts = Counts()
        try:
            own = rules(config, connection, self._prefix)
            self._filter = Filter(library, own, counts, listeners)
        except OSError as error:
            logger.warning("no accept filter", reason=str(error))
            for listener in listeners:
                os.close(listener)
            await server.start_serving()
            return
        self._filter.deliver(self._protocol)

    def _protocol(self, come: Come | None = None) -> Connection:
        """As uvicorn makes them."""
        made: Connection = self.config.http_protocol_class(  # type: ignore[call-arg, assignment]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        made.come = come
        return made

    async def on_tick(self, counter: int) -> bool:
        if self._filter is not None and counter % 10 == 0:
            self._tell(self._filter.counts)
        return await super().on_tick(counter)

    def _tell(self, counts: Counts) -> None:
        """One line of log a second, as of all that is refused by the dozen."""
        late, starved = counts.late, counts.starved
        if late > self._late:
            tell(self._prefix, self._late + 1, late, {"408 timeout": late - self._late})
        if starved > self._starved:
            held = {"held": counts.held, "open": counts.open}
            logger.warning("no descriptor is left for another connection", **held)
        self._late, self._starved = late, starved

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._filter is not None:
            await self._filter.stop()
        await super().shutdown(sockets)
        if self._filter is not None:
            await self._filter.end()


def rules(config: uvicorn.Config, connection: type[Connection], id_prefix: str) -> Rules:
    """The filter's deadlines and bounds: those of the connections."""
    bounds = connection.bounds
    headers = [(b"date", DATE), *config.encoded_headers]
    late, late_v1 = (
        _reply(whole(late_reply(bounds, path), headers, keep_alive=False))
        for path in ("/", f"{PREFIX}models")
    )
    return Rules(
        head_seconds=connection.head_seconds,
        grace_seconds=bounds.grace_seconds,
        bytes_per_second=bounds.bytes_per_second,
        silence_seconds=bounds.silence_seconds,
        linger_seconds=LINGER_SECONDS,
        linger_bytes=LINGER_BYTES,
        head_bytes=HEAD_BYTES,
        body_bytes=min(HOLD_BYTES, bounds.smallest),
        all_bytes=HELD_BY_ALL,
        late=late,
        late_v1=late_v1,
        stopping=_reply(stopping()),
        id_prefix=id_prefix.encode(),
        max_open=connection.max_open,
    )


def _reply(content: bytes) -> Reply:
    """With the places of what the filter writes into it; 0 where there is none."""
    return Reply(content, len(content), max(content.find(ID), 0), max(content.find(DATE), 0))
