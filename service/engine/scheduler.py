"""Decides, with integers and lists, what the next step computes. No torch here.

Running sequences go first (each decodes one token or continues its prompt), then waiting ones are
admitted while tokens, places and blocks last, in the order of `service/engine/fairness.py`: fair
among adapters, those in slots first within fairness. When blocks run out, the youngest running
sequence gives all of its blocks back and starts again later from its tokens ("preemption by
recompute"); the oldest always fits, so something always ends.

What tokens and blocks are left over may go to drafts (`service/engine/speculation.py`): they
displace nobody. Their blocks are given back with the tokens that were wrong, their tokens are
charged when they are right, and no block is known by its hash before its tokens are the sequence's.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol

from service.engine.fairness import AccountKey, FairQueue, by_adapter
from service.engine.kv_cache import BlockPool
from service.engine.prefix import Fill, block_hash, fills
from service.engine.request import AdapterKey, AdapterRef
from service.engine.sequence import Sequence, Status
from service.engine.speculation import Pace, lengths


class AdapterGate(Protocol):
    """Brings adapters to their slots. A reference keeps an adapter from being evicted."""

    def acquire(self, ref: AdapterRef) -> bool:
        """Take a reference if the adapter is in a slot; otherwise ask for it and return False."""
        ...

    def release(self, ref: AdapterRef) -> None: ...

    def resident(self, ref: AdapterRef) -> bool:
        """Is it in a slot?"""
        ...

    def make_way(self, refs: Seq[AdapterRef]) -> None:
        """These have waited too long, the longest first. Where one is only short of a slot, lend
        out no more references to the slots that it needs, until the next call."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens[start : start + count] of one sequence in this step, and a draft behind them:
    tokens that may come next, to be verified by what the step says of them."""

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.count + len(self.draft)

    @property
    def tokens(self) -> list[int]:
        """[rows]"""
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.draft]

    @property
    def samples(self) -> bool:
        """The chunk reaches the last token, so its logits give the next one."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(slots=True)
class Schedule:
    """What one step computes, and what had to give way."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)  # to be written before the chunks run
    prefix_queried: int = 0
    prefix_hit: int = 0

    @property
    def tokens(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)


class Scheduler:
    """Owns the queues and the blocks; the runner only reads what it decides."""

    def __init__(
        self,
        pool: BlockPool,
        gate: AdapterGate,
        *,
        max_sequences: int,
        max_step_tokens: int,
        patience: int = 64,
        age_cap: int = 1024,
        account: AccountKey = by_adapter,
    ) -> None:
        """
        patience  schedules that may pass over a sequence whose adapter has no slot, before slots
                  are emptied for it: adapters that are always in use cannot keep it out
        age_cap   schedules that an account may go without any service before its turn comes,
                  whatever the counters say
        account   whom the tokens of a sequence are charged to
        """
        self.pool = pool
        self.gate = gate
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.patience = patience
        self.waiting = FairQueue(account, slack=max_step_tokens, age_cap=age_cap)
        self.running: list[Sequence] = []
        self.pace = Pace()
        self._late: dict[Sequence, None] = {}  # passed over more than `patience` times
        self._made_way = False

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def schedule(self) -> Schedule:
        """Choose the chunks of the next step and give them their blocks."""
        step = Schedule()
        self.waiting.tick()
        self._make_way()
        budget = self._continue_running(step, self.max_step_tokens)
        if not step.preempted:
            budget = self._admit_waiting(step, budget)
            self._speculate(step, budget)
        return step

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """The step ran: its tokens are in the cache, and full blocks are known prefixes."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.status is Status.RUNNING:
                sequence.computed = chunk.start + chunk.count
                self._remember(sequence)

    def accepted(self, sequence: Sequence) -> None:
        """The last token is what its draft said, so its keys and values are in the cache."""
        if sequence.status is Status.RUNNING:
            sequence.computed = len(sequence.tokens)
            self.waiting.charge(sequence, sequence.computed)
            self._remember(sequence)

    def verified(self, chunk: Chunk) -> None:
        """A draft is over: give back the blocks that only tokens which did not come would fill."""
        sequence = chunk.sequence
        if chunk.draft and sequence.status is Status.RUNNING:
            needed = self.pool.blocks_for(sequence.virtual_tokens + len(sequence.tokens))
            self.pool.deallocate(sequence.blocks[needed:])
            del sequence.blocks[needed:]

    def finish(self, sequence: Sequence) -> None:
        """The sequence is over, wherever it was: give back all that it held."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        if sequence.status is not Status.FINISHED:
            self.waiting.leave(sequence)
        self._late.pop(sequence, None)
        self._release(sequence)
        if sequence.holds_adapter and sequence.adapter is not None:
            self.gate.release(sequence.adapter)
            sequence.holds_adapter = False
        sequence.status = Status.FINISHED

    def _continue_running(self, step: Schedule, budget: int) -> int:
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            count = min(sequence.uncomputed, budget)
            if not self._reserve(sequence, sequence.computed + count, step):
                break  # it was the youngest and gave way itself
            step.chunks.append(Chunk(sequence, sequence.computed, count))
            self.waiting.charge(sequence, sequence.computed + count)
            budget -= count
            index += 1
        return budget

    def _reserve(self, sequence: Sequence, tokens: int, step: Schedule) -> bool:
        """Blocks for the first `tokens` tokens, taken from younger sequences if need be."""
        needed = self.pool.blocks_for(sequence.virtual_tokens + tokens) - len(sequence.blocks)
        while not self.pool.can_allocate(needed):
            youngest = self.running[-1]
            self._preempt(youngest, step)
            if youngest is sequence:
                return False
        if needed > 0:
            sequence.blocks += self.pool.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence, step: Schedule) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        self.waiting.put_back(sequence)
        step.preempted.append(sequence)

    def _make_way(self) -> None:
        """Have slots emptied for those whom others keep out of them."""
        if self._late or self._made_way:
            refs = tuple(s.adapter for s in self._late if s.adapter is not None)
            self.gate.make_way(refs)
            self._made_way = bool(refs)

    def _speculate(self, step: Schedule, budget: int) -> None:
        """Put drafts behind the chunks of sequences that decode, as far as they are worth it."""
        places: list[int] = []
        drafts: list[tuple[int, ...]] = []
        chances: list[list[float]] = []
        for place, chunk in enumerate(step.chunks):
            sequence = chunk.sequence
            drafter = sequence.drafter if sequence.generated and chunk.samples else None
            if drafter is not None and (draft := drafter.draft(sequence.tokens)):
                places.append(place)
                drafts.append(draft)
                chances.append(drafter.chances())
        sampling = sum(chunk.samples for chunk in step.chunks)
        worth = lengths(chances, sampling, self.pace.fixed, budget)
        for place, draft, length in zip(places, drafts, worth, strict=True):
            chunk = step.chunks[place]
            if length := self._room_for(chunk.sequence, length):
                step.chunks[place] = replace(chunk, draft=draft[:length])

    def _room_for(self, sequence: Sequence, length: int) -> int:
        """Blocks for so many tokens of a draft, or for as many as blocks are left."""
        size, known = self.pool.block_size, sequence.virtual_tokens + len(sequence.tokens)
        length = min(length, (len(sequence.blocks) + self.pool.available) * size - known)
        needed = self.pool.blocks_for(known + length) - len(sequence.blocks)
        if needed > 0:
            sequence.blocks += self.pool.allocate(needed)
        return length

    def _admit_waiting(self, step: Schedule, budget: int) -> int:
        """Returns what is left of the budget."""
        if not self._room(budget):
            return budget
        absent: set[AdapterKey] = set()  # asked for in this schedule
        for sequence in self.waiting.candidates(self._resident):
            if not self._ready(sequence, absent):
                continue
            count = self._admit(sequence, budget, step)
            budget -= count
            if count == 0 or not self._room(budget):
                break
        return budget

    def _room(self, budget: int) -> bool:
        return budget > 0 and len(self.running) < self.max_sequences

    def _resident(self, sequence: Sequence) -> bool:
        ref = sequence.adapter
        return ref is None or sequence.holds_adapter or self.gate.resident(ref)

    def _ready(self, sequence: Sequence, absent: set[AdapterKey]) -> bool:
        leader, ref = sequence.leader, sequence.adapter
        if leader is not None and not leader.prefilled and not leader.finished:
            return False
        if ref is None or sequence.holds_adapter:
            return True
        if ref.key in absent:
            return False
        sequence.holds_adapter = self.gate.acquire(ref)
        if not sequence.holds_adapter:
            absent.add(ref.key)
            sequence.skipped += 1
            if sequence.skipped > self.patience:
                self._late[sequence] = None
        else:
            self._late.pop(sequence, None)
        return sequence.holds_adapter

    def _admit(self, sequence: Sequence, budget: int, step: Schedule) -> int:
        """Start the sequence if blocks for all its tokens are there, and one more for everybody
        who runs: otherwise the next step would only take them away again."""
        hit = self._known_prefix(sequence)
        virtual, size = sequence.virtual_tokens, self.pool.block_size
        needed = self.pool.blocks_for(virtual + len(sequence.tokens) + 1) - len(hit)
        if not self.pool.can_allocate(needed + self.pool.idle(hit) + len(self.running)):
            return 0
        self.pool.share(hit)
        sequence.blocks = hit + self.pool.allocate(needed)
        sequence.computed = max(len(hit) * size - virtual, 0)
        sequence.remembered = len(hit)
        step.fills += fills(sequence, len(hit), size)
        self._remember(sequence)  # blocks of virtual tokens: they are filled before anything runs
        if not sequence.admitted:
            sequence.admitted, sequence.cached = True, sequence.computed
            step.prefix_queried += sequence.prompt_length
            step.prefix_hit += sequence.computed
        self.waiting.admit(sequence, sequence.computed)
        sequence.status, sequence.skipped = Status.RUNNING, 0
        self._late.pop(sequence, None)
        self.running.append(sequence)
        count = min(sequence.uncomputed, budget)
        step.chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of its tokens; the last token is always computed, for its logits."""
        full = (sequence.virtual_tokens + len(sequence.tokens) - 1) // self.pool.block_size
        if sequence.request.prompt_logprobs and not sequence.generated:
            full = sequence.virtual_tokens // self.pool.block_size
        self._hash_blocks(sequence, full)
        return self.pool.lookup(sequence.hashes[:full])

    def _hash_blocks(self, sequence: Sequence, full: int) -> None:
        for i in range(len(sequence.hashes), full):
            sequence.hashes.append(block_hash(sequence, i, self.pool.block_size))

    def _remember(self, sequence: Sequence) -> None:
        full = (sequence.virtual_tokens + sequence.computed) // self.pool.block_size
        self._hash_blocks(sequence, full)
        owner = sequence.adapter.digest if sequence.adapter else ""
        for i in range(sequence.remembered, full):
            self.pool.remember(sequence.blocks[i], sequence.hashes[i], owner)
        sequence.remembered = max(sequence.remembered, full)

    def _release(self, sequence: Sequence) -> None:
        self.pool.deallocate(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.remembered = 0
