"""Two servers over one PostgreSQL and one directory of blobs, each with a home of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service import replicas
from tests.service.replicas import CIPHER, SEEN, TICKETS, ask, client, until, upload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def pair(postgresql_database: str, tmp_path: Path) -> Iterator[list[httpx.Client]]:
    """Both start at once over an empty database."""
    blobs = (tmp_path / "blobs").as_uri()
    with replicas.running(tmp_path, postgresql_database, blobs) as found:
        yield found


def test_what_one_server_does_the_other_sees(pair: list[httpx.Client]) -> None:
    one, other = pair
    assert ask(other, "letters").status_code == 404

    # An upload serves on the other, with its first token within a second of the reply.
    uploaded = upload(one, "letters", CIPHER)
    begun = time.monotonic()
    served = ask(other, "letters")
    assert served.status_code == 200, served.text
    assert time.monotonic() - begun < SEEN
    assert served.headers["x-adapter-digest"] == uploaded["digest"]

    # An alias moves there and back while the other answers requests for it: each gets one of the
    # two versions, and the first request after the move gets the new one.
    second = upload(other, "letters", TICKETS)
    digests = {1: uploaded["digest"], 2: second["digest"]}
    assert digests[1] != digests[2]
    _point(one, 1)
    seen: list[tuple[int, str]] = []
    moved = threading.Event()

    def read() -> None:
        while not moved.is_set():
            response = ask(other, "letters@prod")
            seen.append((response.status_code, response.headers.get("x-adapter-digest", "")))

    reading = threading.Thread(target=read)
    reading.start()
    for version in (2, 1, 2, 1, 2):
        time.sleep(0.2)
        _point(one, version)
        assert ask(other, "letters@prod").headers["x-adapter-digest"] == digests[version]
    moved.set()
    reading.join()
    assert {status for status, _ in seen} == {200}
    assert {digest for _, digest in seen} == set(digests.values())

    # A deletion: the other does not serve from its memory what is gone.
    assert one.delete("/adapters/letters@1").status_code == 200
    assert ask(other, "letters@1").status_code == 404
    assert ask(other, "letters@2").status_code == 200

    # A key of one opens the other at once, and is closed there within a second.
    body = {"name": "a key", "tenant": "default", "scopes": ["infer"]}
    made = one.post("/keys", json=body).json()
    with client(str(other.base_url), made["key"]) as holder:
        assert ask(holder, "letters").status_code == 200
        assert one.delete(f"/keys/{made['id']}").status_code == 200
        until(lambda: ask(holder, "letters").status_code == 401, SEEN)
        assert ask(holder, "letters").status_code == 401


def test_both_upload_the_same_name_at_once(pair: list[httpx.Client]) -> None:
    found: list[dict[str, Any]] = []
    sent = [
        threading.Thread(target=lambda s=server, a=sample: found.append(upload(s, "both", a)))  # type: ignore[misc]
        for server, sample in zip(pair, (CIPHER, TICKETS), strict=True)
    ]
    for each in sent:
        each.start()
    for each in sent:
        each.join()
    assert sorted(one["version"] for one in found) == [1, 2]
    for server in pair:
        for manifest in found:
            response = ask(server, f"both@{manifest['version']}")
            assert response.headers["x-adapter-digest"] == manifest["digest"]


def _point(server: httpx.Client, version: int) -> None:
    response = server.put("/adapters/letters/aliases/prod", json={"version": version})
    assert response.status_code == 200, response.text
