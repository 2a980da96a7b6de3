"""Long lists: in pages, or whole and piece by piece, so that nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi.responses import StreamingResponse

from service.api import paging
from service.api.paging import listed, pieces
from tests.waiting import PATIENCE


def views(count: int) -> Iterator[Sequence[dict[str, Any]]]:
    """`count` of them, each third piece empty, as where a filter leaves nothing."""
    names = [f"näme-{number}" for number in range(count)]
    for begin in range(0, count, 4):
        yield [{"name": name} for name in names[begin : begin + 4]]
        yield []


async def body_of(made: Iterator[Sequence[dict[str, Any]]], limit: int | None) -> tuple[bool, Any]:
    """Whether it was sent in pieces, and what it says."""
    reply = await listed(made, limit, "data", object="list")
    if not isinstance(reply, StreamingResponse):
        return False, json.loads(bytes(reply.body))
    chunks = [chunk async for chunk in reply.body_iterator]
    assert all(chunks), "an empty chunk would end the reply"
    return True, json.loads(b"".join(bytes(chunk) for chunk in chunks))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 41])
@pytest.mark.parametrize("limit", [None, 1, 4, 5, 40, 41, 100])
def test_a_list_is_whole_or_says_that_there_is_more(count: int, limit: int | None) -> None:
    _, found = asyncio.run(body_of(views(count), limit))
    most = count if limit is None else min(limit, count)
    assert found.keys() == {"object", "data", "has_more"}
    assert [one["name"] for one in found["data"]] == [f"näme-{n}" for n in range(most)]
    assert found["has_more"] == (most < count)


def test_others_are_served_while_a_long_list_is_made() -> None:
    turn = threading.Event()

    def made_beside() -> Iterator[Sequence[dict[str, Any]]]:
        for piece in views(40):
            turn.clear()
            assert turn.wait(PATIENCE), "the loop stood still while the list was made"
            yield piece

    async def run() -> tuple[bool, Any]:
        ended = asyncio.Event()

        async def other() -> None:
            while not ended.is_set():
                turn.set()
                await asyncio.sleep(0.001)

        beside = asyncio.ensure_future(other())
        found = await body_of(made_beside(), None)
        ended.set()
        await beside
        return found

    streamed, found = asyncio.run(run())
    assert streamed
    assert len(found["data"]) == 40


def test_pieces_begin_behind_the_last() -> None:
    asked = []

    def read(after: str, limit: int) -> Sequence[str]:
        asked.append((after, limit))
        return [name for name in "abcde" if name > after][:2]

    assert list(pieces(read, "a", str)) == [["b", "c"], ["d", "e"]]
    assert asked == [(after, paging.PIECE) for after in "ace"]


def in_pages(client: httpx.Client, path: str, key: str, name: str = "name") -> list[str]:
    """The names of a list, one at a time; and that they are those of the whole."""
    whole = client.get(path).json()
    assert whole["has_more"] is False
    found, after = [], ""
    while True:
        page = client.get(path, params={"limit": 1, "after": after}).json()
        assert len(page[key]) == 1
        found += page[key]
        if not page["has_more"]:
            break
        after = found[-1][name]
    assert found == whole[key]
    assert len(found) >= 2
    for wrong in ("0", "10001", "-1", "many"):
        refused = client.get(path, params={"limit": wrong})
        assert refused.status_code == (400 if path.startswith("/v1") else 422), refused.text
    return [one[name] for one in found]


@pytest.mark.parametrize(
    ("path", "key", "name"), [("/adapters", "adapters", "name"), ("/v1/models", "data", "id")]
)
def test_pages_of_a_server_make_the_list(
    client: httpx.Client, path: str, key: str, name: str
) -> None:
    """OpenAI's SDK asks for no page, and gets all."""
    in_pages(client, path, key, name)


def test_templates_have_the_same_pages(client: httpx.Client) -> None:
    names = ["a-page", "b.page", "b_page", "c-page"]
    for version, name in enumerate([*names, *names]):
        body = {"name": name, "user": f"{{{{ input }}}} {version}"}
        assert client.post("/templates", json=body).status_code == 201
    try:
        assert in_pages(client, "/templates", "templates") == names

        def found(**asked: str) -> list[str]:
            page = client.get("/templates", params=asked).json()
            return [f"{one['name']}@{one['version']}" for one in page["templates"]]

        assert found(search="B") == ["b.page@2", "b_page@2"]
        assert found(search="b_") == ["b_page@2"]  # no character that stands for others
        assert found(search="%") == []
        assert found(search="page", after="b.page", limit="1") == ["b_page@2"]
        assert found(after="bb") == ["c-page@2"]
    finally:
        for name in names:
            client.delete(f"/templates/{name}")
