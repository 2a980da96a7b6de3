"""Slots and host cache: bytes add up, the least recently used leaves, and nobody in use does."""

from __future__ import annotations

import pytest
import torch

from adapters.delta import LinearDelta, LoweredAdapter, LowRank
from service.engine.request import AdapterKey
from service.residency.host_cache import HostCache
from service.residency.slots import Slots


def adapter(name: str, floats: int = 8) -> LoweredAdapter:
    """An adapter of `floats` * 8 bytes."""
    term = LowRank(torch.zeros(1, floats), torch.zeros(floats, 1))
    return LoweredAdapter(name, "lora", "unmerged", {"x": LinearDelta((term,))})


def key(name: str) -> AdapterKey:
    return AdapterKey(name, "unmerged", "")


def test_the_least_recently_used_slot_is_given_away() -> None:
    slots = Slots(2 * 64)
    for name in "ab":
        slots.allocate(key(name), adapter(name))
    slots.acquire(key("a"))
    slots.release(key("a"))
    assert slots.allocate(key("c"), adapter("c")) == [key("b")]
    slots.check_integrity()


def test_used_and_pinned_slots_are_not() -> None:
    slots = Slots(2 * 64)
    for name in "ab":
        slots.allocate(key(name), adapter(name))
    slots.acquire(key("a"))
    slots[key("b")].pinned = True
    assert not slots.can_allocate(64)
    slots.release(key("a"))
    assert slots.can_allocate(64)
    assert not slots.can_allocate(65)
    assert slots.allocate(key("c"), adapter("c")) == [key("a")]


def test_tensors_that_are_shared_count_once() -> None:
    shared = torch.zeros(1, 8)
    delta = LinearDelta((LowRank(shared, torch.zeros(8, 1)),))
    both = LoweredAdapter("a", "lora", "unmerged", {"x": delta, "y": delta})
    assert both.nbytes == 64


def test_our_own_mistakes_are_found() -> None:
    slots = Slots(64)
    slots.allocate(key("a"), adapter("a"))
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


def test_what_is_larger_than_the_cache_evicts_nothing() -> None:
    cache = HostCache(64)
    cache.put(key("a"), adapter("a"))
    assert cache.put(key("big"), adapter("big", 100)) == []
    assert [k for k, _ in cache.items()] == [key("a")]
