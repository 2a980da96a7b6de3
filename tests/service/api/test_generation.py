"""From events to replies, with events made by hand: the cases that chance decides elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.api.generation import Collector, Origin, completion, stream_events
from service.api.generation_schema import StreamEvent
from service.engine.request import Event, Finished, Request, Sampling, Token
from service.errors import Draining, GenerationFailed
from tests.waiting import simulated


class Played:
    """A stream that plays (delay in seconds, event)."""

    def __init__(self, *events: tuple[float, Event]) -> None:
        self.events = events

    async def __aiter__(self) -> AsyncIterator[Event]:
        for delay, event in self.events:
            if delay:
                await asyncio.sleep(delay)
            yield event

    def cancel(self) -> None: ...


def origin(n: int = 1, **sampling: Any) -> Origin:
    return Origin(
        Request("r", (1, 2, 3), Sampling(**{"max_new_tokens": 3, **sampling}), n=n),
        selection=None,
        best_of=False,
        details=True,
        prefix="",
        decode=lambda ids: [str(token) for token in ids],
    )


def token(
    text: str, id: int = 5, index: int = 0, special: bool = False, last: bool = False
) -> Token:
    return Token(index, id, text, -0.5, special, last=last)


def end(text: str, reason: Any = "length", index: int = 0, **more: Any) -> Finished:
    fields = {"prompt_tokens": 3, "cached_tokens": 0, "generated_tokens": len(text), **more}
    return Finished(index, reason, text, **fields)


def events_of(stream: Played, about: Origin) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [event async for event in stream_events(stream, about, "id")]

    events = simulated(collect())
    for event in events:
        if "error" not in event:
            StreamEvent.model_validate(event)
    return events


@pytest.mark.parametrize("delay", [0, 0.2])
def test_the_end_comes_with_the_last_token(delay: float) -> None:
    """However late the end is seen, it is in the last token's event."""
    stream = Played((0, token("a")), (0, token("b", last=True)), (delay, end("ab")))
    events = events_of(stream, origin())
    assert [event["generated_text"] for event in events] == [None, "ab"]


def test_no_token_waits_for_the_next_one() -> None:
    """A token that is not the last leaves before the next is there."""
    seen: list[str] = []

    class Watched(Played):
        async def __aiter__(self) -> AsyncIterator[Event]:
            yield token("a")
            await asyncio.sleep(0.05)
            seen.append("next")
            yield token("b")
            yield end("ab")

    async def collect() -> None:
        async for event in stream_events(Watched(), origin(), "id"):
            seen.append(event["token"]["text"])

    simulated(collect())
    assert seen[:2] == ["a", "next"]


def test_an_end_that_comes_alone_is_an_event_without_a_token() -> None:
    stream = Played((0, token("a")), (0.2, end("ab", "stop_sequence", tail="b")))
    events = events_of(stream, origin(stop=("x",)))
    assert [event["token"]["text"] for event in events] == ["a", "b"]
    assert [event["index"] for event in events] == [1, 1]
    assert events[-1]["token"]["special"] is False
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"
    empty = events_of(Played((0.0, token("a")), (0.2, end("a", "stop_sequence"))), origin())
    assert (empty[-1]["token"]["text"], empty[-1]["token"]["special"]) == ("", True)


def test_text_is_never_hidden_in_a_special_token() -> None:
    """Clients skip special tokens; an end token may carry text that was held back before it."""
    stream = Played(
        (0, token("held", id=9, special=True, last=True)), (0, end("held", "eos_token"))
    )
    assert events_of(stream, origin())[0]["token"]["special"] is False
    stream = Played((0, token("", id=9, special=True, last=True)), (0, end("", "eos_token")))
    assert events_of(stream, origin())[0]["token"]["special"] is True


def test_sequences_interleave() -> None:
    stream = Played(
        (0, token("a", index=0)),
        (0, token("x", index=1)),
        (0, token("b", index=0, id=9, last=True)),
        (0, end("ab", "eos_token", 0)),
        (0, token("y", index=1)),
        (0, token("z", index=1, last=True)),
        (0.05, end("xyz", "length", 1)),
    )
    events = events_of(stream, origin(n=2))
    shown = [(e["sequence"], e["index"], e["token"]["text"], e["generated_text"]) for e in events]
    assert shown == [
        (0, 1, "a", None),
        (1, 1, "x", None),
        (0, 2, "b", "ab"),
        (1, 2, "y", None),
        (1, 3, "z", "xyz"),
    ]


@pytest.mark.parametrize(("reason", "kind"), [("error", "generation"), ("cancelled", "draining")])
def test_a_bad_end_is_an_event_and_an_error(reason: str, kind: str) -> None:
    fault = GenerationFailed("the adapter is at fault") if reason == "error" else None
    last = end("a", reason, error=fault)
    events = events_of(Played((0, token("a")), (0, last)), origin())
    assert events[0]["token"]["text"] == "a"
    assert events[1]["error_type"] == kind
    assert events[1]["request_id"] == "id"
    assert len(events) == 2
    collector = Collector(origin())
    with pytest.raises(Exception, match=r"at fault|stopped before"):
        collector.add(last)


def test_seed_only_when_it_mattered() -> None:
    for samples, wanted in ((True, 77), (False, None)):
        collector = Collector(origin(do_sample=samples))
        collector.add(end("", seed=77))
        assert completion(collector)["details"]["seed"] == wanted


def test_draining_is_not_a_success() -> None:
    with pytest.raises(Draining):
        Collector(origin()).add(end("", "cancelled"))
