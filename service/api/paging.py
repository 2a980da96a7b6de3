"""Lists of what may be a hundred thousand, whole or in pages as OpenAI has them.

A list is made and sent piece by piece, each in a thread, with as long a rest behind it as it took:
whoever lists all waits for that, and nobody else does. What comes or goes meanwhile is in the list
or not; what was there all the time is in it once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import Query
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

PIECE = 100  # adapters: some ten milliseconds
AT_ONCE = 3  # chunks: a list of fewer is made at once
MAX_PAGE = 10_000
T = TypeVar("T")
Json = dict[str, Any]

Limit = Annotated[
    int | None, Query(ge=1, le=MAX_PAGE, description="At most so many; without it, all.")
]
After = Annotated[
    str,
    Query(
        max_length=64,
        description="Begin behind this name, in the order of names, whether it is there or not.",
    ),
]
Search = Annotated[str, Query(max_length=64, description="Only names that have this in them.")]
HasMore = Annotated[
    bool, Field(description="Whether `limit` cut some off: go on `after` the last.")
]


def pieces(
    read: Callable[[str, int], Sequence[T]], after: str, name: Callable[[T], str]
) -> Iterator[Sequence[T]]:
    """All that `read(after, so many)` brings behind `after`, a piece at a time."""
    while found := read(after, PIECE):
        yield found
        after = name(found[-1])


async def listed(
    views: Iterator[Sequence[Json]], limit: int | None, key: str, **beside: str
) -> Response:
    """`{**beside, key: [views], "has_more": …}`."""
    chunks = _encoded(views, limit, key, beside)
    begun = await asyncio.to_thread(lambda: list(islice(chunks, AT_ONCE)))
    if len(begun) < AT_ONCE:
        return Response(b"".join(begun), media_type="application/json")
    return StreamingResponse(_sent(begun, chunks), media_type="application/json")


async def _sent(begun: Sequence[bytes], chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in filter(None, begun):  # an empty one would end the reply
        yield chunk
    while True:
        started = time.perf_counter()
        following = await asyncio.to_thread(next, chunks, None)
        if following is None:
            return
        took = time.perf_counter() - started
        if following:
            yield following
        await asyncio.sleep(took)


def _encoded(
    views: Iterator[Sequence[Json]], limit: int | None, key: str, beside: Mapping[str, str]
) -> Iterator[bytes]:
    """The object as it is sent: a chunk for each piece, empty ones too, and its end."""
    opening = "".join(f"{_json(name)}:{_json(value)}," for name, value in beside.items())
    text, more = f"{{{opening}{_json(key)}:[", False
    for piece in views:
        if limit is not None:
            more = len(piece) > limit
            piece, limit = piece[:limit], limit - min(limit, len(piece))
        yield (text + ",".join(map(_json, piece))).encode() if piece else b""
        text = "," if piece else text
        if more:
            break
    yield f"{text if text != ',' else ''}],{_json('has_more')}:{_json(more)}}}".encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
