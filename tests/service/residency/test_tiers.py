"""Tiers: loads overlap with whatever the engine does, are bounded, and are made once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from adapters.delta import LoweredAdapter
from service.engine.observer import Silent
from service.engine.request import AdapterKey, AdapterRef
from service.errors import Overloaded
from service.residency.tiers import Resident, Tiers
from tests.service.residency.test_slots import adapter
from tests.waiting import PATIENCE

SIZE = 64  # bytes of one adapter here


class Store:
    """Adapters by digest; a gate holds back the fetch of those in `slow`."""

    def __init__(self) -> None:
        self.slow: dict[str, threading.Event] = {}
        self.fetched: list[str] = []
        self.began = threading.Semaphore(0)

    def fetch(self, ref: AdapterRef) -> LoweredAdapter:
        self.began.release()
        if ref.digest in self.slow:
            assert self.slow[ref.digest].wait(PATIENCE)
        self.fetched.append(ref.digest)
        if ref.digest == "broken":
            raise OSError("no such file")
        return adapter(ref.digest, 100 if ref.digest == "large" else 8)


class Ear(Silent):
    """Keeps what tiers tell."""

    def __init__(self) -> None:
        self.sought: list[str] = []
        self.refused: list[str] = []
        self.loads: list[tuple[float, float]] = []

    def adapter_sought(self, name: str, tier: str) -> None:
        self.sought.append(tier)

    def adapter_refused(self, name: str) -> None:
        self.refused.append(name)

    def adapter_loaded(self, key: AdapterKey, seconds: float, nbytes: int, queued: float) -> None:
        self.loads.append((seconds, queued))


class Bench:
    """Tiers of two slots over a host cache of three, and this thread in the engine's place."""

    def __init__(self, max_loads: int = 4) -> None:
        self.store, self.ear = Store(), Ear()
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.tiers = Tiers(
            self.store.fetch,
            self.posted.put,
            self.ear,
            left=lambda digest: None,
            host_bytes=3 * SIZE,
            slot_bytes=2 * SIZE,
            device=torch.device("cpu"),
            max_loads=max_loads,
            workers=2,
        )

    def settle(self, loads: int = 1) -> None:
        """Take in `loads` loads that end."""
        for _ in range(loads):
            self.posted.get(timeout=PATIENCE)()
        self.tiers.check_integrity()

    def claimed(self, *digests: str) -> list[AdapterRef]:
        """Requests for these are accepted."""
        refs = [AdapterRef(digest, digest) for digest in digests]
        for ref in refs:
            self.tiers.claims.take(ref)
            self.tiers.prefetch(ref)
        return refs

    def use(self, *digests: str) -> None:
        """One request after the other, each with its load, to its end."""
        for digest in digests:
            (ref,) = self.claimed(digest)
            self.settle()
            assert self.tiers.acquire(ref)
            self.tiers.release(ref)
            self.tiers.claims.drop(ref)

    def where(self) -> dict[str, str]:
        return {one.digest: one.tier for one in self.tiers.residents()}


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = Bench()
    yield found
    for event in found.store.slow.values():
        event.set()
    found.tiers.close()


def test_a_load_is_made_once_and_nobody_waits_for_it(bench: Bench) -> None:
    bench.store.slow["a"] = threading.Event()
    (a,) = bench.claimed("a")
    assert bench.store.began.acquire(timeout=PATIENCE), "it begins at once, before anybody acquires"
    assert bench.where() == {"a": "loading"}
    for _ in range(3):
        assert not bench.tiers.acquire(a)
        bench.tiers.prefetch(a)
    (b,) = bench.claimed("b")
    bench.settle()
    assert bench.tiers.acquire(b), "another cold one is not behind it"
    bench.store.slow["a"].set()
    bench.settle()
    assert bench.where() == {"a": "slot", "b": "slot"}
    assert bench.tiers.acquire(a)
    assert bench.store.fetched == ["b", "a"]


def test_too_many_loads_refuse_newcomers_only(bench: Bench) -> None:
    for digest in "abcd":
        bench.store.slow[digest] = threading.Event()
    refs = bench.claimed(*"abcd")
    with pytest.raises(Overloaded, match="4 adapters are being loaded, 4 may: 'e'") as refused:
        bench.tiers.prefetch(AdapterRef("e", "e"))
    assert refused.value.retry_after > 0
    assert bench.ear.refused == ["e"]
    bench.tiers.prefetch(refs[0])  # joins the load that is under way
    late = AdapterRef("f", "f")
    bench.tiers.claims.take(late)
    assert not bench.tiers.acquire(late), "who was accepted is not refused any more"
    assert bench.where()["f"] == "loading"
    for event in bench.store.slow.values():
        event.set()
    bench.settle(5)
    (seconds, queued), *_ = sorted(bench.ear.loads, key=lambda load: -load[1])
    assert 0 < queued <= seconds
    bench.tiers.prefetch(AdapterRef("e", "e"))


def test_what_nobody_claims_any_more_is_not_fetched(bench: Bench) -> None:
    for digest in "ab":
        bench.store.slow[digest] = threading.Event()
    bench.claimed(*"ab")
    (c,) = bench.claimed("c")
    bench.tiers.claims.drop(c)
    for event in bench.store.slow.values():
        event.set()
    bench.settle(3)
    assert sorted(bench.store.fetched) == ["a", "b"]
    assert "c" not in bench.where()
    bench.claimed("c")
    bench.settle()
    assert "c" in bench.store.fetched, "it is asked for anew"


def test_hits_are_told_by_the_tier_where_a_request_finds_its_adapter(bench: Bench) -> None:
    for digest in "abc":
        (ref,) = bench.claimed(digest)
        bench.settle()
        bench.tiers.seek(ref)  # the load that it waited for is no hit, however soon it ended
        bench.tiers.acquire(ref)
        bench.tiers.release(ref)
        bench.tiers.claims.drop(ref)
    assert bench.where() == {"b": "slot", "c": "slot", "a": "host"}
    for digest in "ab":
        bench.tiers.seek(AdapterRef(digest, digest))
    assert bench.ear.sought == ["store", "store", "store", "host", "slot"]
    found = {one.digest: one for one in bench.tiers.residents()}
    assert found["a"].hits == 1
    assert found["a"].last_used > 1e9


def test_uses_are_remembered_when_all_tiers_are_left(bench: Bench) -> None:
    bench.use(*"abcd")
    (gone,) = (one for one in bench.tiers.residents() if one.digest == "a")
    assert gone == Resident("a", "unmerged", "", "store", 0, hits=1, last_used=gone.last_used)
    bench.tiers.forget("a")
    assert "a" not in bench.where()


def test_a_tally_is_of_what_is_in_memory_and_costs_nothing_for_the_rest(bench: Bench) -> None:
    bench.use(*"abcd")
    bench.claimed("e")
    assert bench.where() == {"c": "slot", "d": "slot", "b": "host", "e": "loading", "a": "store"}
    told = {"slot": (2, 2 * SIZE), "host": (1, SIZE), "loading": (1, 0)}
    assert bench.tiers.tally() == told
    assert [one.tier for one in bench.tiers.residents("b")] == ["host"]
    for number in range(20_000):  # that were used once: a scrape asks between two steps
        bench.tiers.seek(AdapterRef(f"{number:064x}", "x"))
    took = []
    for _ in range(20):  # the garbage of other tests may be collected in one of them
        begun = time.thread_time()
        assert bench.tiers.tally() == told
        took.append(time.thread_time() - begun)
    assert min(took) < 0.002
    bench.settle()


def test_who_is_claimed_stays_when_another_arrives(bench: Bench) -> None:
    a, b = bench.claimed(*"ab")
    bench.settle(2)
    (c,) = bench.claimed("c")
    bench.settle()
    assert bench.where() == {"a": "slot", "b": "slot", "c": "host"}
    bench.tiers.claims.drop(b)
    assert bench.tiers.acquire(c)
    assert bench.where() == {"a": "slot", "c": "slot", "b": "host"}
    assert bench.tiers.acquire(a)


def test_a_slot_in_the_way_is_lent_to_nobody_until_it_is_free(bench: Bench) -> None:
    a, b = bench.claimed(*"ab")
    bench.settle(2)
    for ref in (a, a, b):
        assert bench.tiers.acquire(ref)
    (c,) = bench.claimed("c")
    bench.tiers.make_way([c])
    assert bench.tiers.acquire(b), "a load stands in nobody's way"
    bench.tiers.release(b)
    bench.settle()
    assert not bench.tiers.acquire(c)
    bench.tiers.make_way([c])
    assert not bench.tiers.acquire(b), "the one of fewest references"
    assert not bench.tiers.resident(b)
    assert bench.tiers.acquire(a)
    bench.tiers.release(b)
    assert bench.tiers.acquire(c)
    bench.tiers.make_way([])
    assert not bench.tiers.acquire(b)


@pytest.mark.parametrize(
    ("digest", "says"),
    [("broken", "could not be loaded: no such file"), ("large", "needs 800 bytes, all slots")],
)
def test_what_cannot_be_placed_says_why(bench: Bench, digest: str, says: str) -> None:
    bench.tiers.host.budget = 1000
    (ref,) = bench.claimed(digest)
    bench.settle()
    bench.tiers.acquire(ref)
    assert says in bench.tiers.take_failures()[ref.key]
    assert bench.tiers.take_failures() == {}


def test_pinned_slots_are_named_where_they_are_in_the_way(bench: Bench) -> None:
    a, b = bench.claimed(*"ab")
    bench.settle(2)
    for ref in (a, b):
        bench.tiers.pin(ref, True)
    (c,) = bench.claimed("c")
    bench.settle()
    assert not bench.tiers.acquire(c)
    assert "pinned adapters keep 128: unpin one" in bench.tiers.take_failures()[c.key]
    bench.tiers.pin(a, False)
    bench.tiers.claims.drop(a)
    assert bench.tiers.acquire(c)


def test_what_is_forgotten_on_its_way_does_not_arrive(bench: Bench) -> None:
    bench.store.slow["a"] = threading.Event()
    bench.claimed("a")
    bench.tiers.forget("a")
    bench.store.slow["a"].set()
    bench.settle()
    assert bench.where() == {}


def test_claims_are_counted_and_never_dropped_twice(bench: Bench) -> None:
    claims, ref = bench.tiers.claims, AdapterRef("a", "a")
    claims.take(ref, 2)
    claims.drop(ref)
    assert claims.needs("a")
    assert ref.key in claims
    claims.drop(ref)
    assert not claims.needs("a")
    assert ref.key not in claims
    with pytest.raises(AssertionError, match="dropped twice"):
        claims.drop(ref)
    whole = AdapterRef("sum", "a:1,b:2", parts=(("x", 1.0), ("y", 2.0)))
    claims.take(whole)
    assert all(claims.needs(digest) for digest in ("sum", "x", "y"))
