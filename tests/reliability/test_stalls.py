"""Clients that stall are cut off, and others hear nothing of it. The long form is stalls.py."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response

from service.api.connection import Connection
from service.api.door import Bounds, Door
from service.tracing.trace import Untraced
from tests.oracle import make_base
from tests.reliability.clients import Client, Load, open_loop, poisson, request
from tests.reliability.crowd import KINDS, Stalled, stall
from tests.reliability.served import serving
from tests.reliability.stalls import measure
from tests.service.api.conftest import Running

CLIENTS, LIMIT = 128, 1.0


@pytest.mark.parametrize("filtered", [True, False])
def test_a_hundred_stalled_clients(monkeypatch: pytest.MonkeyPatch, filtered: bool) -> None:
    monkeypatch.setattr(Connection, "head_seconds", LIMIT)
    monkeypatch.setattr(Connection, "stall_seconds", LIMIT)
    monkeypatch.setattr("service.api.door.LINGER_SECONDS", 0.1)
    monkeypatch.setattr("service.api.connection.LINGER_SECONDS", 0.1)
    monkeypatch.setattr("service.net.listening.LINGER_SECONDS", 0.1)
    app = FastAPI()
    bounds = Bounds(1 << 20, grace_seconds=LIMIT, silence_seconds=LIMIT)
    app.add_middleware(Door, bounds=bounds, tracing=Untraced())

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(8 << 20))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        return Response(await request.body())

    async def both() -> tuple[Stalled, list[float]]:
        stalling = asyncio.ensure_future(
            asyncio.to_thread(stall, running.address, CLIENTS, 20, request("/large"), 0.1)
        )
        client, times = Client(running.address), []
        while not stalling.done():
            answer = await client.ask(request("/generate", {"a": 1}))
            assert (answer.status, answer.body) == (200, b'{"a": 1}')
            times.append(answer.seconds)
        await client.close()
        return await stalling, times

    running = Running(app, bounds=bounds, filtered=filtered)
    stalled, times = asyncio.run(both())
    running.stop()
    assert set(stalled.borne) == set(KINDS)
    assert stalled.longest < 20, stalled
    assert min(min(times) for times in stalled.borne.values()) > LIMIT / 2
    assert len(times) > 5, "others waited for the stalled ones"


def test_requests_by_chance_are_the_same_ones_again() -> None:
    moments = poisson(50, 10, seed=1)
    assert moments == poisson(50, 10, seed=1) != poisson(50, 10, seed=2)
    assert 400 < len(moments) < 600
    assert moments == sorted(moments)
    assert moments[-1] < 10
    gaps = [after - before for before, after in pairwise(moments)]
    assert max(gaps) > 3 / 50 > 0.5 / 50 > min(gaps)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A client that is late hides nothing: the loop that sends stands still for a while."""
    app = FastAPI()

    @app.get("/")
    async def here() -> str:
        return "here"

    async def late() -> Load:
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.3)
        return await open_loop(running.address, request("/"), [0.0, 0.05, 0.1], 1)

    running = Running(app)
    load = asyncio.run(late())
    running.stop()
    assert [answer.status for answer in load.answers] == [200] * 3
    assert sorted(load.since_due(200))[1] > 0.15


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_stalled_clients(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    with serving(tmp_path / "run", "--base", str(base)) as served:
        longest = measure(served, 1000, 15, 1)
    # All are, within the minute that they are watched. Within ten seconds on a machine that has the
    # time: stalls.py judges that.
    assert longest < 60
