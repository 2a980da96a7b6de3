"""Slots and host cache: bytes add up, the least recently used leaves, and nobody in use does."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from adapters.delta import LinearDelta, LoweredAdapter, LowRank
from service.engine.request import AdapterKey
from service.residency.host_cache import HostCache
from service.residency.ledger import Ledger, footprint
from service.residency.slots import Slots


def adapter(name: str, floats: int = 8, shared: torch.Tensor | None = None) -> LoweredAdapter:
    """An adapter of `floats` * 8 bytes; with `shared` [1, n], that tensor in place of its A."""
    A = torch.zeros(1, floats) if shared is None else shared
    return LoweredAdapter(
        name, "lora", "unmerged", {"x": LinearDelta((LowRank(A, torch.zeros(floats, 1)),))}
    )


def key(name: str) -> AdapterKey:
    return AdapterKey(name, "unmerged", "")


def place(slots: Slots, name: str, one: LoweredAdapter | None = None) -> list[AdapterKey]:
    """Give it a slot; who left for it."""
    one = one or adapter(name)
    evicted = slots.evict_for(one)
    assert slots.allocate(key(name), one)
    slots.check_integrity()
    return evicted


def test_the_least_recently_used_slot_is_given_away() -> None:
    slots = Slots(2 * 64)
    for name in "ab":
        place(slots, name)
    slots.acquire(key("a"))
    slots.release(key("a"))
    assert place(slots, "c") == [key("b")]


def test_used_and_pinned_slots_are_not() -> None:
    slots = Slots(2 * 64)
    for name in "ab":
        place(slots, name)
    slots.acquire(key("a"))
    slots.pin(key("b"), True)
    assert not slots.can_allocate(footprint(adapter("c")))
    assert slots.evict_for(adapter("c")) == []
    assert not slots.allocate(key("c"), adapter("c"))
    slots.release(key("a"))
    assert slots.can_allocate(footprint(adapter("c")))
    assert not slots.can_allocate(footprint(adapter("d", 9)))
    assert place(slots, "c") == [key("a")]
    slots.pin(key("b"), False)
    assert slots.can_allocate(footprint(adapter("d", 16)))


def test_who_is_claimed_leaves_last_or_not_at_all() -> None:
    slots = Slots(2 * 64)
    for name in "ab":
        place(slots, name)
    assert slots.evict_for(adapter("c"), {key("a")}) == [key("b")]
    place(slots, "b")
    assert slots.evict_for(adapter("c"), {key("a"), key("b")}, spare=True) == []
    assert slots.evict_for(adapter("c"), {key("a"), key("b")}) == [key("a")]


def test_the_slot_of_fewest_references_is_emptied_for_another() -> None:
    slots = Slots(3 * 64)
    for name, references in (("a", 3), ("b", 1), ("c", 2)):
        place(slots, name)
        for _ in range(references):
            slots.acquire(key(name))
    slots.empty_for(footprint(adapter("d")))
    assert [k.digest for k, slot in slots.items() if slot.leaving] == ["b"]
    slots.empty_for(footprint(adapter("d", 16)))
    assert {k.digest for k, slot in slots.items() if slot.leaving} == {"b", "c"}
    slots.pin(key("b"), True)
    slots.empty_for(footprint(adapter("d")))
    assert [k.digest for k, slot in slots.items() if slot.leaving] == ["c"]
    slots.empty_for(None)
    assert not any(slot.leaving for _, slot in slots.items())


def test_tensors_that_are_shared_count_once() -> None:
    shared = torch.zeros(1, 8)
    delta = LinearDelta((LowRank(shared, torch.zeros(8, 1)),))
    both = LoweredAdapter("a", "lora", "unmerged", {"x": delta, "y": delta})
    assert both.nbytes == 64


def test_what_adapters_share_counts_once_and_goes_with_the_last() -> None:
    matrix = torch.zeros(1, 1000)
    slots, cache = Slots(4000 + 3 * 32), HostCache(4000 + 3 * 32)
    for name in "abc":
        one = adapter(name, 8, matrix)
        assert place(slots, name, one) == []
        assert cache.put(key(name), one) == []
    assert slots.allocated == cache.allocated == 4000 + 3 * 32
    for left, name in ((2, "a"), (1, "b")):
        slots.deallocate(key(name))
        cache.drop(key(name))
        assert slots.allocated == cache.allocated == 4000 + left * 32
        slots.check_integrity()
        cache.check_integrity()
    slots.deallocate(key("c"))
    cache.drop(key("c"))
    assert slots.allocated == cache.allocated == 0


def test_what_a_used_slot_shares_cannot_be_had_by_evicting_another() -> None:
    matrix = torch.zeros(1, 1000)
    slots = Slots(4000 + 2 * 32)
    place(slots, "a", adapter("a", 8, matrix))
    place(slots, "b", adapter("b", 8, matrix))
    slots.acquire(key("a"))
    assert not slots.can_allocate(footprint(adapter("c", 16)))  # 128 bytes; without a, 32 are free
    assert slots.can_allocate(footprint(adapter("c", 4)))
    assert slots.can_allocate(footprint(adapter("c", 8, matrix)))


@given(
    events=st.lists(
        st.tuples(st.integers(0, 7), st.sampled_from(["put", "drop", "get"])), max_size=40
    )
)
def test_the_cache_never_holds_more_than_its_budget(events: list[tuple[int, str]]) -> None:
    """Whoever comes and goes, and whatever they share: distinct tensors of those inside add up."""
    matrices = [torch.zeros(1, 20), torch.zeros(1, 30)]
    cache = HostCache(300)
    for number, verb in events:
        name = key(str(number))
        if verb == "put":
            shared = matrices[number % 3] if number % 3 < 2 else None
            cache.put(name, adapter(str(number), 1 + number, shared))
            assert name in cache
        elif verb == "drop":
            cache.drop(name)
            assert name not in cache
        else:
            cache.get(name)
        cache.check_integrity()


def test_a_ledger_counts_holders() -> None:
    ledger = Ledger()
    ledger.add({1: 10, 2: 5})
    assert ledger.beyond({2: 5, 3: 7}) == 7
    ledger.add({2: 5, 3: 7})
    assert ledger.total == 22
    ledger.remove({1: 10, 2: 5})
    assert ledger.total == 12
    ledger.remove({2: 5, 3: 7})
    assert ledger.total == 0
    with pytest.raises(KeyError):
        ledger.remove({1: 10})


def test_our_own_mistakes_are_found() -> None:
    slots = Slots(64)
    place(slots, "a")
    slots.acquire(key("a"))
    with pytest.raises(AssertionError, match="is freed while 1 use it"):
        slots.deallocate(key("a"))
    slots.release(key("a"))
    with pytest.raises(AssertionError, match="twice"):
        slots.release(key("a"))


def test_the_host_cache_keeps_what_was_used_last() -> None:
    cache = HostCache(2 * 64)
    for name in "ab":
        assert cache.put(key(name), adapter(name)) == []
    assert cache.get(key("a")) is not None
    assert cache.put(key("c"), adapter("c")) == [key("b")]
    assert cache.get(key("b")) is None
    assert cache.allocated == 128
    assert cache.put(key("d"), adapter("d"), {key("a")}) == [key("c")], "a is claimed"


def test_what_is_larger_than_the_cache_evicts_nothing() -> None:
    cache = HostCache(64)
    cache.put(key("a"), adapter("a"))
    assert cache.put(key("big"), adapter("big", 100)) == []
    assert [k for k, _ in cache.items()] == [key("a")]
