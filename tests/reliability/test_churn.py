"""Adapters that are loaded, evicted, replaced under one name and forgotten while requests run and
are cancelled: no token differs from what the same request says alone."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from adapters.errors import AdapterNotFound
from base.load import load_base
from service.engine.loop import Engine
from service.engine.request import AdapterRef, Finished, Request, Token
from service.engine.stream import Stream
from tests.oracle import make_adapter, make_base
from tests.waiting import PATIENCE, until
from tests.zoo import Zoo, collect, greedy, slowly, specimen, start

NAME = "support"  # of every adapter: each replaces the others
AT_ONCE = 24
TOKENS = 12
MANY = int(os.environ.get("CHURN_REQUESTS", "10000"))  # of the slow form


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, list[AdapterRef]]]:
    home = tmp_path_factory.mktemp("churn")
    source = make_base(home / "base", "qwen3")
    base = load_base(source, device="cpu", dtype="float32")
    zoo = Zoo(source, base)
    for number, kind in enumerate(("lora", "dora", "rslora", "lora")):
        zoo.specimens.append(
            specimen(make_adapter(home / f"{number}", source, kind, rank=4, seed=number), base)
        )
    refs = {s.ref().digest: s.ref() for s in zoo.specimens}
    lowered = {digest: zoo.fetch(ref) for digest, ref in refs.items()}
    size = max(one.nbytes for one in lowered.values())
    engine = start(
        base,
        fetch=lambda ref: lowered[ref.digest],
        slot_bytes=int(size * 2.5),
        host_cache_bytes=int(size * 2.5),
        kv_cache_bytes=1 << 19,
    )
    yield engine, [AdapterRef(digest, NAME) for digest in refs]
    engine.stop()


def orders(refs: list[AdapterRef]) -> list[Request]:
    """Few prompts, so that a wrong block of the prefix cache would be found too."""
    chance = random.Random(3)
    prompts = [[chance.randrange(1, 500) for _ in range(length)] for length in (3, 20, 40)]
    return [greedy("", prompt, ref, TOKENS) for prompt in prompts for ref in (None, *refs)]


def read(stream: Stream) -> tuple[list[int], Finished]:
    tokens, (end,) = collect(stream)
    return [token.id for token in tokens], end


@pytest.mark.parametrize("requests", [300, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_no_token_of_another_adapter(
    engine: tuple[Engine, list[AdapterRef]], requests: int
) -> None:
    running, refs = engine
    asked = orders(refs)
    want = [read(running.submit(request))[0] for request in asked]
    assert len({tuple(one) for one in want}) == len(want), "or a mistake would not show"
    chance, open_streams, counted = random.Random(11), [], Counter[str]()
    forgotten = [0.0]

    def judge(which: int, stream: Stream, cancelled: bool) -> None:
        found, end = read(stream)
        assert end.error is None
        counted[end.reason] += 1
        counted["tokens"] += len(found)
        assert found == want[which][: len(found)]
        assert cancelled or len(found) == TOKENS

    with slowly(running, 0.005):
        for number in range(requests):
            which = chance.randrange(len(asked))
            if number % 100 == 50:  # the adapter is deleted while its requests run
                running.forget(refs[number // 100 % len(refs)].digest)
                forgotten[0] += 1
            try:
                stream = running.submit(asked[which])
            except AdapterNotFound:
                counted["not found"] += 1
                continue
            cancelled = chance.random() < 0.2
            if cancelled:
                time.sleep(chance.random() * 0.01)
                stream.cancel()
            open_streams.append((which, stream, cancelled))
            if len(open_streams) == AT_ONCE:
                judge(*open_streams.pop(chance.randrange(AT_ONCE)))
        for one in open_streams:
            judge(*one)
    running.check_integrity()
    assert counted["cancelled"] > requests // 20
    print(requests, dict(counted), f"{forgotten[0]:g} deletions")


def test_a_cancelled_request_frees_all_at_every_phase(
    engine: tuple[Engine, list[AdapterRef]],
) -> None:
    """Before its adapter is there, in its prompt, at its first token, in the middle."""
    running, refs = engine
    for digest in {ref.digest for ref in refs}:
        running.forget(digest)
    for phase in (0, 1, 2, 5, 11):
        for ref in refs:
            with slowly(running, 0.02):
                stream = running.submit(greedy(f"{phase}", [7] * 150, ref, 100))
                events = stream.iterate(PATIENCE)
                for _ in range(phase):
                    assert isinstance(next(events), Token)
                stream.cancel()
                ends = [event for event in events if isinstance(event, Finished)]
            assert [end.reason for end in ends] == ["cancelled"]
            running.check_integrity()
            until(lambda: _at_rest(running))


def test_a_cancelled_request_frees_its_place_in_the_queue(
    engine: tuple[Engine, list[AdapterRef]],
) -> None:
    """Of several sequences that guess ahead, some run and some wait for blocks."""
    running, refs = engine
    asked = [
        replace(greedy(f"{n}", [7 + n] * 150, refs[n % 4], 100), n=3, prompt_lookup_num_tokens=4)
        for n in range(12)
    ]
    with slowly(running):
        streams = [running.submit(request) for request in asked]
        until(lambda: running.stats().waiting and running.stats().running)
        for stream in reversed(streams):  # those that wait first
            stream.cancel()
    ends = [end for stream in streams for end in collect(stream)[1]]
    assert [end.reason for end in ends] == ["cancelled"] * 3 * len(asked)
    running.check_integrity()
    until(lambda: _at_rest(running))


def _at_rest(engine: Engine) -> bool:
    """By its last step, which ends after what it cancelled is told."""
    return (engine.stats().running, engine.stats().waiting) == (0, 0)
