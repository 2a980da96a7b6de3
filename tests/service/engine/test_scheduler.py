"""The scheduler without a model: a property test over any sequence of events, and its rules."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from service.engine.kv_cache import BlockPool
from service.engine.request import AdapterRef, Request, Sampling
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence, Status
from service.engine.speculation import Drafter
from tests.service.engine.cells import Cells

BLOCK = 4
BLOCKS = 16
LONGEST = BLOCK * BLOCKS
DRAFT = 6
VIRTUAL = {"b": 3, "c": 8, "d": 21}  # tokens of an adapter: no whole block, two, five and a piece


class Gate:
    """Slots for `places` adapters; a load takes one call of `arrive`."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.references: dict[str, int] = {}
        self.wanted: list[str] = []
        self.leaving: set[str] = set()

    def resident(self, ref: AdapterRef) -> bool:
        return ref.digest in self.references

    def make_way(self, refs: Seq[AdapterRef]) -> None:
        """Let the slot of fewest references run empty for the first of them."""
        self.leaving = set()
        full = len(self.references) >= self.places
        if full and any(ref.digest not in self.references for ref in refs):
            self.leaving = {min(self.references, key=lambda digest: self.references[digest])}

    def acquire(self, ref: AdapterRef) -> bool:
        if ref.digest in self.references and ref.digest not in self.leaving:
            self.references[ref.digest] += 1
            return True
        if ref.digest not in self.references and ref.digest not in self.wanted:
            self.wanted.append(ref.digest)
        return False

    def release(self, ref: AdapterRef) -> None:
        assert self.references[ref.digest] > 0
        self.references[ref.digest] -= 1

    def arrive(self) -> None:
        """Give the longest wanted adapter a slot, if one is free or can be made free."""
        if not self.wanted:
            return
        if len(self.references) >= self.places:
            idle = [digest for digest, count in self.references.items() if count == 0]
            if not idle:
                return
            first = next((digest for digest in idle if digest in self.leaving), idle[0])
            del self.references[first]
        self.references[self.wanted.pop(0)] = 0


def follow(tokens: Seq[int]) -> int:
    """What comes after these."""
    return (sum(tokens) + len(tokens)) % 7


class Guesser(Drafter):
    """Guesses for certain, and is right for as many tokens as the length of the sequence says."""

    def draft(self, tokens: Seq[int]) -> tuple[int, ...]:
        room = min(self.most, self.limit - len(tokens) - 1)
        right, found = len(tokens) * 5 % (DRAFT + 2), list(tokens)
        for i in range(room):
            found.append(follow(found) + (i >= right))
        self._guess = tuple(found[len(tokens) :])
        return self._guess

    def chances(self) -> list[float]:
        return [1.0] * len(self._guess)


def make(
    number: int, prompt: list[int], most: int, adapter: str | None = None, *, drafts: bool = False
) -> Sequence:
    virtual = VIRTUAL.get(adapter or "", 0)
    prompt = prompt[: LONGEST - 1 - virtual]
    ref = AdapterRef(adapter, adapter, virtual_tokens=virtual) if adapter else None
    request = Request(str(number), tuple(prompt), Sampling(max_new_tokens=most), ref)
    namespace = (adapter or "").encode()
    limit = min(len(prompt) + most, LONGEST - virtual)
    drafter = Guesser(DRAFT, limit) if drafts else None
    return Sequence(number, request, 0, 0, prompt[:], len(prompt), namespace, drafter=drafter)


def step(scheduler: Scheduler, cells: Cells | None = None) -> list[Sequence]:
    """Run one step as the engine would: every chunk that reaches the end gets a token, and more
    while its draft is right."""
    schedule = scheduler.schedule()
    assert schedule.tokens <= scheduler.max_step_tokens
    for chunk in schedule.chunks:
        sequence = chunk.sequence
        assert sequence.status is Status.RUNNING
        assert chunk.count > 0
        assert chunk.start == sequence.computed
        stop = sequence.virtual_tokens + chunk.start + chunk.rows
        assert len(sequence.blocks) * BLOCK >= stop
        assert not chunk.draft or chunk.samples
    if cells is not None:
        cells.run(schedule)
    scheduler.computed(schedule.chunks)
    ended = []
    for chunk in schedule.chunks:
        sequence = chunk.sequence
        if chunk.start + chunk.count < len(sequence.tokens):
            continue
        for guess in (*chunk.draft, None):
            sequence.tokens.append(follow(sequence.tokens))
            full = sequence.virtual_tokens + len(sequence.tokens) >= LONGEST
            if full or sequence.generated >= sequence.request.sampling.max_new_tokens:
                scheduler.finish(sequence)
                ended.append(sequence)
                assert guess is None, "a draft goes beyond the end"
                break
            if sequence.tokens[-1] != guess:
                break
            scheduler.accepted(sequence)
        scheduler.verified(chunk)
        assert sequence.finished or sequence.uncomputed == 1
        full_blocks = (sequence.virtual_tokens + sequence.computed) // BLOCK
        assert sequence.remembered <= full_blocks, "a block is known before it is full"
    return ended


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of submit, step, cancel, load and forget: nothing leaks and nothing starves."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, BLOCK)
        self.gate = Gate(2)
        self.scheduler = Scheduler(
            self.pool, self.gate, max_sequences=5, max_step_tokens=12, patience=3
        )
        self.cells = Cells(BLOCK)
        self.numbers = 0
        self.living: list[Sequence] = []

    @rule(
        target=sequences,
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST - 1),
        most=st.integers(1, 20),
        adapter=st.sampled_from([None, "a", "b", "c", "d"]),
        twins=st.booleans(),
        drafts=st.booleans(),
    )
    def submit(
        self, prompt: list[int], most: int, adapter: str | None, twins: bool, drafts: bool
    ) -> Sequence:
        self.numbers += 1
        sequence = make(self.numbers, prompt, most, adapter, drafts=drafts)
        self.scheduler.add(sequence)
        self.living.append(sequence)
        if twins:
            self.numbers += 1
            second = make(self.numbers, prompt, most, adapter, drafts=drafts)
            second.leader = sequence
            self.scheduler.add(second)
            self.living.append(second)
        return sequence

    @rule()
    def compute(self) -> None:
        for sequence in step(self.scheduler, self.cells):
            self.living.remove(sequence)

    @rule()
    def load(self) -> None:
        self.gate.arrive()

    @rule(sequence=sequences)
    def cancel(self, sequence: Sequence) -> None:
        if sequence in self.living:
            self.scheduler.finish(sequence)
            self.living.remove(sequence)

    @rule(adapter=st.sampled_from(["", "a", "b", "c", "d"]))
    def forget(self, adapter: str) -> None:
        self.pool.forget(adapter)

    @precondition(lambda self: self.living)
    @rule()
    def everything_ends(self) -> None:
        """With steps and loads alone, all that was submitted ends in bounded time."""
        work = sum(len(s.tokens) + s.request.sampling.max_new_tokens for s in self.living)
        for _ in range(100 + 20 * work):
            if not self.living:
                break
            self.gate.arrive()
            self.compute()
            self.adds_up()
        assert not self.living, [s.id for s in self.living]
        assert self.scheduler.idle
        assert self.pool.used == 0

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity()
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert {s.id for s in (*running, *waiting)} == {s.id for s in self.living}
        assert len(running) <= self.scheduler.max_sequences
        assert self.pool.references() == sum(len(s.blocks) for s in running)
        assert all(not s.blocks for s in waiting)
        held = [s for s in self.living if s.holds_adapter]
        assert len(held) == sum(self.gate.references.values())
        assert all(s.holds_adapter for s in running if s.adapter)


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


def scheduler(**limits: int) -> Scheduler:
    given = {"max_sequences": 8, "max_step_tokens": 16, **limits}
    return Scheduler(BlockPool(BLOCKS, BLOCK), Gate(1), **given)


def test_a_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    plan = scheduler()
    short = make(1, [1], 8)
    plan.add(short)
    step(plan)
    long = make(2, list(range(40)), 2)
    plan.add(long)
    schedule = plan.schedule()
    assert [(c.sequence.id, c.count) for c in schedule.chunks] == [(1, 1), (2, 15)]


def test_drafts_take_what_tokens_and_blocks_are_left() -> None:
    plan = scheduler(max_step_tokens=6)
    one, two = make(1, [1] * 4, 30, drafts=True), make(2, [2] * 3, 30, drafts=True)
    for sequence in (one, two):
        plan.add(sequence)
        step(plan)
    plan.schedule()
    held = len(one.blocks)
    schedule = plan.schedule()
    assert schedule.tokens == 6, "two tokens and four of the drafts"
    hoard = plan.pool.allocate(plan.pool.available)
    assert len(one.blocks) >= held
    schedule = plan.schedule()
    assert not schedule.preempted, "a draft takes no block from anybody"
    for chunk in schedule.chunks:
        held = len(chunk.sequence.blocks) * BLOCK
        assert chunk.start + chunk.rows <= held
        plan.verified(chunk)
        assert len(chunk.sequence.blocks) == -(-len(chunk.sequence.tokens) // BLOCK)
    plan.pool.deallocate(hoard)


def test_a_draft_that_is_right_is_charged_and_known_to_the_cache() -> None:
    plan = scheduler()
    first = make(1, [1, 2, 3], 30, drafts=True)
    plan.add(first)
    steps = 0
    while not first.finished:
        step(plan)
        steps += 1
    assert steps < 20, "30 tokens, several in a step"
    twin = make(2, first.tokens[:], 4)
    plan.add(twin)
    step(plan)
    assert twin.cached == (len(first.tokens) - 1) // BLOCK * BLOCK


def test_the_youngest_gives_way_and_starts_again_from_its_tokens() -> None:
    plan = scheduler()
    old, young = make(1, [1] * 27, 30), make(2, [2] * 27, 30)
    plan.add(old)
    plan.add(young)
    for _ in range(9):
        step(plan)
    while young.status is Status.RUNNING:
        step(plan)
    assert old.status is Status.RUNNING
    assert young.blocks == []
    assert young.generated > 0
    while not young.finished:
        step(plan)
    assert young.generated == 30
    assert plan.pool.used == 0


def test_a_second_request_reuses_the_blocks_of_the_same_prefix() -> None:
    plan = scheduler(max_step_tokens=64)
    first, second = make(1, list(range(20)), 1), make(2, list(range(20)), 1)
    plan.add(first)
    step(plan)
    plan.add(second)
    schedule = plan.schedule()
    assert second.cached == 16
    assert schedule.chunks[0].start == 16
    assert schedule.prefix_hit == 16


def test_a_prompt_of_whole_blocks_still_computes_its_last_token() -> None:
    plan = scheduler(max_step_tokens=64)
    first, second = make(1, list(range(16)), 1), make(2, list(range(16)), 1)
    plan.add(first)
    step(plan)
    plan.add(second)
    plan.schedule()
    assert second.cached == 12, "without the last block there is no logit to sample from"


def test_other_adapters_never_share_a_prefix() -> None:
    plan = scheduler(max_step_tokens=64)
    gate = plan.gate
    assert isinstance(gate, Gate)
    gate.references["a"] = 0
    plan.add(make(1, list(range(20)), 1, "a"))
    step(plan)
    plain = make(2, list(range(20)), 1)
    plan.add(plain)
    plan.schedule()
    assert plain.cached == 0


def test_a_rare_adapter_is_not_starved_by_a_hot_one() -> None:
    plan = scheduler(patience=5)
    gate = plan.gate
    assert isinstance(gate, Gate)
    gate.references["hot"] = 0
    plan.add(make(0, [1, 2], 4, "hot"))
    rare = make(1, [1, 2], 2, "rare")
    plan.add(rare)
    for number in range(2, 200):
        plan.add(make(number, [1, 2], 4, "hot"))
        step(plan)
        gate.arrive()
        if rare.finished:
            return
    raise AssertionError("the rare adapter's request never ran")


def test_siblings_wait_for_the_shared_prompt() -> None:
    plan = scheduler(max_step_tokens=8)
    first, second = make(1, list(range(20)), 2), make(2, list(range(20)), 2)
    second.leader = first
    plan.add(first)
    plan.add(second)
    while second.status is Status.WAITING:
        step(plan)
    assert second.cached == 16
