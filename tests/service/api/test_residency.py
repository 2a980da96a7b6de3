"""Cold adapters over HTTP: they arrive beside what runs, and what was accepted is served."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api import adapters as views
from tests.service.api.conftest import PATIENCE, Running, until
from tests.service.api.test_adapters import fresh, push, uploads
from tests.service.api.test_generate import ask, stream

__all__ = ["fresh", "uploads"]


class Slow:
    """The engine's own way to the store, held back until `go` for adapters of these digests."""

    def __init__(self, server: Running) -> None:
        assert server.desk.serving is not None
        self.engine: Any = server.desk.serving.engine
        self.store = server.desk.serving.store
        self.loads = self.engine._tiers.loads
        self.go = threading.Event()
        self.held: set[str] = set()
        self._fetch = self.loads._fetch

    def fetch(self, ref: Any) -> Any:
        if ref.digest in self.held:
            assert self.go.wait(PATIENCE)
        return self._fetch(ref)

    def loading(self, digest: str) -> bool:
        return any(key.digest == digest for key, _ in self.loads.items())


@pytest.fixture
def slow(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow(server)
    monkeypatch.setattr(found.loads, "_fetch", found.fetch)
    yield found
    found.go.set()
    until(lambda: len(found.loads) == 0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def test_others_run_on_while_a_cold_adapter_is_loaded(
    client: httpx.Client, uploads: Path, fresh: str, slow: Slow, pool: ThreadPoolExecutor
) -> None:
    alone = ask(client, adapter_id="lora", max_new_tokens=20)["generated_text"]
    digest = push(client, fresh, uploads / "first").json()["digest"]
    slow.held.add(digest)
    cold = pool.submit(ask, client, adapter_id=fresh, max_new_tokens=4)
    until(lambda: slow.loading(digest))
    for adapter in ("lora", "dora", None, "lora"):  # each to its end, while the other one waits
        events = stream(client, adapter_id=adapter, max_new_tokens=20, ignore_eos=True)
        assert len(events) == 20
    assert ask(client, adapter_id="lora", max_new_tokens=20)["generated_text"] == alone
    assert not cold.done()
    listed = client.get("/adapters", params={"resident": "loading"}).json()["adapters"]
    assert [one["name"] for one in listed] == [fresh]
    assert listed[0]["residency"][0]["bytes"] == 0
    assert "nibble:adapter_loads_pending" in client.get("/metrics").text
    slow.go.set()
    assert cold.result()["generated_text"]


def test_the_load_begins_before_the_prompt_is_read(
    client: httpx.Client, uploads: Path, fresh: str, slow: Slow, server: Running,
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert server.desk.serving is not None
    digest = push(client, fresh, uploads / "first").json()["digest"]
    assembly, reading = server.desk.serving.assembly, threading.Event()
    text = assembly.text

    async def late(*arguments: Any) -> Any:
        assert slow.loading(digest), "the prompt is read, and nobody fetches the adapter yet"
        reading.set()
        return await text(*arguments)

    monkeypatch.setattr(type(assembly), "text", staticmethod(late))
    slow.held.add(digest)
    cold = pool.submit(ask, client, adapter_id=fresh, max_new_tokens=2)
    assert reading.wait(PATIENCE)
    slow.go.set()
    assert cold.result()["generated_text"]


def test_a_deleted_adapter_serves_what_was_accepted_before(
    client: httpx.Client, uploads: Path, fresh: str, slow: Slow, pool: ThreadPoolExecutor
) -> None:
    made = push(client, fresh, uploads / "first").json()
    wanted = ask(client, adapter_id=fresh, max_new_tokens=6)["generated_text"]
    slow.engine.forget(made["digest"])  # cold again
    blob = slow.store.weights_path(slow.store.resolve(fresh))
    slow.held.add(made["digest"])
    queued = [pool.submit(ask, client, adapter_id=fresh, max_new_tokens=6) for _ in range(3)]
    until(lambda: slow.engine.waiting == 3)
    gone: Future[httpx.Response] = pool.submit(client.delete, f"/adapters/{fresh}")
    until(lambda: client.get(f"/adapters/{fresh}").status_code == 404)
    body = {"inputs": "a", "parameters": {"adapter_id": fresh}}
    assert client.post("/generate", json=body).status_code == 404
    assert blob.exists()
    assert not gone.done()
    slow.go.set()
    assert [one.result()["generated_text"] for one in queued] == [wanted] * 3
    assert gone.result().status_code == 200
    assert not blob.exists(), "nobody needs it any more"
    assert made["digest"] not in {one.digest for one in slow.engine.residents()}


def test_a_full_queue_of_loads_refuses_cold_adapters_and_serves_the_others(
    client: httpx.Client, uploads: Path, fresh: str, slow: Slow, pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = push(client, fresh, uploads / "first").json()
    second = push(client, fresh, uploads / "second").json()
    ask(client, adapter_id="lora", max_new_tokens=1)
    monkeypatch.setattr(slow.loads, "most", 1)
    slow.held.add(first["digest"])
    cold = pool.submit(ask, client, adapter_id=f"{fresh}@1", max_new_tokens=2)
    until(lambda: slow.loading(first["digest"]))
    body = {"inputs": "a", "parameters": {"adapter_id": f"{fresh}@2", "max_new_tokens": 2}}
    refused = client.post("/generate", json=body)
    assert refused.status_code == 429
    assert refused.json()["error_type"] == "overloaded"
    assert "1 adapters are being loaded, 1 may" in refused.json()["error"]
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post(f"/adapters/{fresh}@2/load").status_code == 429
    joined = pool.submit(ask, client, adapter_id=f"{fresh}@1", max_new_tokens=2)
    assert ask(client, adapter_id="lora", max_new_tokens=1)
    slow.go.set()
    assert cold.result() == joined.result()
    until(lambda: len(slow.loads) == 0)
    assert client.post("/generate", json=body).status_code == 200
    assert second["digest"] in {one.digest for one in slow.engine.residents()}


def test_the_list_shows_where_each_adapter_is(
    client: httpx.Client, uploads: Path, fresh: str
) -> None:
    def listed(resident: str | None = None) -> dict[str, views.AdapterView]:
        given = {} if resident is None else {"resident": resident}
        found = views.AdapterList.model_validate(client.get("/adapters", params=given).json())
        return {one.name: one for one in found.adapters}

    push(client, fresh, uploads / "first")
    assert listed()[fresh].tier == "store"
    assert (listed()[fresh].hits, listed()[fresh].last_used) == (0, None)
    assert fresh in listed("store")
    assert fresh in listed("false")
    assert fresh not in listed("true")
    ask(client, adapter_id=fresh, max_new_tokens=1)
    ask(client, adapter_id=fresh, max_new_tokens=1)
    found = listed("slot")[fresh]
    assert (found.tier, found.hits) == ("slot", 2)
    assert found.last_used is not None
    assert found.residency[0].bytes > 0
    assert fresh in listed("true")
    assert fresh not in listed("store")
    wrong = client.get("/adapters", params={"resident": "disk"})
    assert wrong.status_code == 422
    assert wrong.json()["field"] == "resident"
