"""Who is admitted next: bounded unfairness, no starvation, and the order of arrival otherwise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from service.engine.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from service.engine.kv_cache import BlockPool
from service.engine.request import AdapterRef
from service.engine.scheduler import Chunk, Schedule, Scheduler
from service.engine.sequence import Sequence
from tests.service.engine.test_scheduler import Gate, make, step

PLACES = 3
LONGEST_PROMPT, MOST = 12, 8
STEP_TOKENS = 16


class Traffic:
    """A scheduler, requests with numbers of their own, and what each adapter was served."""

    def __init__(self, *, slots: int = 16, places: int = PLACES, **limits: int) -> None:
        self.gate = Gate(slots)
        given = {"max_sequences": places, "max_step_tokens": STEP_TOKENS, **limits}
        self.plan = Scheduler(BlockPool(64, 4), self.gate, **given)
        self.chunks: list[Chunk] = []
        schedule = self.plan.schedule

        def recorded() -> Schedule:
            found = schedule()
            self.chunks = found.chunks
            return found

        self.plan.schedule = recorded  # type: ignore[method-assign]
        self.served: Counter[str] = Counter()
        self.tenants: Counter[str] = Counter()
        self.started: dict[Sequence, None] = {}
        self.queued: Counter[str] = Counter()
        self.count = 0

    def add(self, adapter: str, prompt: int = 4, most: int = 4, tenant: str = "") -> Sequence:
        self.count += 1
        # Every prompt another one: a known prefix is free, which is a test of its own.
        tokens = [self.count * 31 + place for place in range(prompt)]
        sequence = make(self.count, tokens, most, adapter)
        sequence.request = replace(sequence.request, tenant=tenant)
        self.plan.add(sequence)
        self.queued[adapter] += 1
        return sequence

    def waiting(self, adapter: str) -> int:
        return self.queued[adapter]

    def step(self) -> None:
        step(self.plan)
        for chunk in self.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            prompt = sequence.prompt_length
            if sequence not in self.started:
                self.started[sequence] = None
                self.queued[digest(sequence)] -= 1
            output = max(0, end - prompt) - max(0, chunk.start - prompt)
            cost = PROMPT_WEIGHT * (chunk.count - output) + OUTPUT_WEIGHT * output
            self.served[digest(sequence)] += cost
            self.tenants[sequence.request.tenant] += cost
        self.gate.arrive()


def digest(sequence: Sequence) -> str:
    assert sequence.adapter is not None
    return sequence.adapter.digest


@settings(max_examples=25)
@given(data=st.data(), names=st.integers(2, 4), resident=st.integers(0, 4))
def test_backlogged_adapters_are_served_alike(
    data: st.DataObject, names: int, resident: int
) -> None:
    """Whatever the lengths of their requests: the difference stays below 2 U + slack."""
    traffic = Traffic()
    adapters = "abcd"[:names]
    traffic.gate.references.update(dict.fromkeys(adapters[:resident], 0))
    lengths = {
        name: (data.draw(st.integers(1, LONGEST_PROMPT)), data.draw(st.integers(1, MOST)))
        for name in adapters
    }
    flood = data.draw(st.integers(PLACES + 1, 20))
    unit = max(PROMPT_WEIGHT * LONGEST_PROMPT, OUTPUT_WEIGHT * PLACES * MOST)
    bound = 2 * unit + STEP_TOKENS
    for number in range(150):
        for name in adapters:
            # The first floods; the others have always one more waiting than there are places.
            for _ in range((flood if name == "a" else PLACES + 1) - traffic.waiting(name)):
                traffic.add(name, *lengths[name])
        traffic.step()
        if number == 5:  # all loads are over: from here on everybody could be served
            traffic.served.clear()
        shares = [traffic.served[name] for name in adapters]
        assert max(shares) - min(shares) <= bound
    assert sum(shares) > 2 * bound, "too little was served to tell"


def test_a_long_queue_of_one_adapter_does_not_keep_others_waiting() -> None:
    traffic = Traffic()
    traffic.gate.references.update(hot=0, rare=0)
    for _ in range(300):
        traffic.add("hot")
    for _ in range(20):
        traffic.step()
    rare = traffic.add("rare")
    for _ in range(10):
        traffic.step()
    assert rare.finished
    assert traffic.waiting("hot") > 200


@pytest.mark.parametrize("age_cap", [5, 10_000])
def test_many_adapters_give_a_tenant_no_larger_share(age_cap: int) -> None:
    traffic = Traffic(slots=100, age_cap=age_cap)
    many = [f"m{number}" for number in range(30)]
    for name in (*many, "one"):
        traffic.gate.references[name] = 0
    for _ in range(200):
        for name in many:
            if traffic.waiting(name) < 2:
                traffic.add(name, 6, 3, "greedy")
        while traffic.waiting("one") < PLACES + 1:
            traffic.add("one", 6, 3, "modest")
        traffic.step()
        unit = max(PROMPT_WEIGHT * 6, OUTPUT_WEIGHT * PLACES * 3)
        assert abs(traffic.tenants["greedy"] - traffic.tenants["modest"]) <= 2 * unit + STEP_TOKENS
    assert traffic.tenants["modest"] > 10 * unit
    shares = [traffic.served[name] for name in many]
    assert max(shares) - min(shares) <= 2 * unit + STEP_TOKENS  # and within it adapters are alike


def test_a_tenant_that_comes_back_has_saved_nothing_up() -> None:
    traffic = Traffic(slots=100)
    for name in "ab":
        traffic.gate.references[name] = 0
    traffic.add("b", 4, 4, "rested")
    for _ in range(100):
        while traffic.waiting("a") < PLACES + 1:
            traffic.add("a", 4, 4, "busy")
        traffic.step()
    before = traffic.tenants["busy"]
    for _ in range(100):
        for name, tenant in (("a", "busy"), ("b", "rested")):
            while traffic.waiting(name) < PLACES + 1:
                traffic.add(name, 4, 4, tenant)
        traffic.step()
    assert traffic.tenants["busy"] - before > 0.4 * traffic.tenants["rested"]


def _starved(age_cap: int) -> int:
    """Steps until a sequence is admitted that is ahead of all others, while new adapters come."""
    traffic = Traffic(slots=10_000, places=1, age_cap=age_cap)
    traffic.add("ahead", 12, 8)
    traffic.add("other", 1, 1)
    for _ in range(9):
        traffic.step()
    late = traffic.add("ahead", 1, 1)
    for number in range(300):
        for name in (f"new-{number}", f"more-{number}"):
            traffic.gate.references[name] = 0
            traffic.add(name, 1, 1)
        traffic.step()
        if late.finished:
            return number
    return -1


def test_the_age_cap_ends_what_counters_alone_would_not() -> None:
    assert _starved(age_cap=10_000) == -1, "newcomers enter below it for ever"
    assert 0 < _starved(age_cap=20) <= 30


@settings(max_examples=25)
@given(
    events=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 12), st.integers(1, 8)), max_size=40
    ),
    pauses=st.lists(st.integers(0, 3), min_size=40, max_size=40),
)
def test_within_an_adapter_the_order_is_that_of_arrival(
    events: list[tuple[str, int, int]], pauses: list[int]
) -> None:
    traffic = Traffic(age_cap=5, patience=2, slots=2)
    for event, pause in zip(events, pauses, strict=False):
        traffic.add(*event)
        for _ in range(pause):
            traffic.step()
    for _ in range(2000):
        if traffic.plan.idle:
            break
        traffic.step()
    assert traffic.plan.idle, "everything that came has ended"
    for name in "abc":
        ids = [s.id for s in traffic.started if s.adapter == AdapterRef(name, name)]
        assert ids == sorted(ids)


def queue(slack: int = 0) -> FairQueue:
    return FairQueue(slack=slack, age_cap=100)


def take(line: FairQueue, resident: str = "") -> int:
    sequence = next(line.candidates(lambda s: s.adapter is None or s.adapter.digest in resident))
    line.admit(sequence, cached=0)
    return sequence.id


def test_equals_go_in_order_of_arrival() -> None:
    line = queue()
    for number, name in enumerate("cabcab"):
        line.add(make(number, [1, 2], 1, name))
    assert [sequence.id for sequence in line] == list(range(6))
    assert [take(line) for _ in range(6)] == list(range(6))
    assert not line


def test_adapters_in_slots_go_first_up_to_the_slack() -> None:
    line = queue(slack=10)
    line.add(make(0, [1] * 2, 1, "cold"))
    for number in range(1, 9):
        line.add(make(number, [1] * 4, 1, "warm"))
    # 4 tokens each: at 0, 4 and 8 it is within ten tokens of the cold one, at 12 it is not.
    assert [take(line, "warm") for _ in range(5)] == [1, 2, 3, 0, 4]


def test_who_comes_back_has_saved_nothing() -> None:
    line = queue()
    busy = [make(number, [1] * 10, 1, "busy") for number in range(10)]
    for sequence in busy:
        line.add(sequence)
    for _ in range(4):
        take(line)
    for number in range(10, 14):
        line.add(make(number, [1] * 10, 1, "late"))
    assert [take(line) for _ in range(4)] == [4, 10, 5, 11]


def test_what_need_not_be_computed_is_free_and_nothing_is_charged_twice() -> None:
    line = queue()
    one = make(1, [1] * 8, 4, "a")
    line.add(one)
    line.add(make(2, [1] * 8, 4, "a"))
    line.admit(one, cached=6)
    account = line._tenants[""].accounts["a"]
    assert account.counter == 2
    line.charge(one, 9)
    assert account.counter == 2 + OUTPUT_WEIGHT
    line.put_back(one)
    assert [sequence.id for sequence in line] == [1, 2]
    line.admit(one, cached=0)
    line.charge(one, 9)
    assert account.counter == 2 + OUTPUT_WEIGHT


def test_accounts_are_forgotten_with_the_last_sequence() -> None:
    line = queue()
    for number in range(500):
        sequence = make(number, [1], 1, f"a{number}")
        line.add(sequence)
        if number:
            line.leave(sequence)
    assert len(list(line._accounts())) < 100
    line.leave(next(iter(line)))
    assert line._tenants == {}
    assert line._paid == {}


@pytest.mark.parametrize("patience", [3, 30])
def test_slots_that_are_always_in_use_are_emptied_for_who_waits_too_long(patience: int) -> None:
    traffic = Traffic(slots=2, places=6, patience=patience)
    traffic.gate.references.update(hot=0, warm=0)
    rare = None
    for number in range(100):
        for name in ("hot", "warm"):
            for _ in range(3 - traffic.waiting(name)):
                traffic.add(name)
        if number == 5:
            rare = traffic.add("rare")
        traffic.step()
        if rare is not None and rare.finished:
            # Only schedules with a place to give count: here about every second one.
            assert patience <= number <= 2 * patience + 25
            return
    raise AssertionError("it never got a slot")
