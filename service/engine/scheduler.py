"""Decides, with integers and lists, what the next step computes. No torch here.

Running sequences go first (each decodes one token or continues its prompt), then waiting ones are
admitted in order of arrival while tokens, places and blocks last. When blocks run out, the youngest
running sequence gives all of its blocks back and starts again later from its tokens ("preemption by
recompute"); the oldest always fits, so something always ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from service.engine.kv_cache import BlockPool, chain_hash
from service.engine.request import AdapterRef
from service.engine.sequence import Sequence, Status


class AdapterGate(Protocol):
    """Brings adapters to their slots. A reference keeps an adapter from being evicted."""

    def acquire(self, ref: AdapterRef) -> bool:
        """Take a reference if the adapter is in a slot; otherwise ask for it and return False."""
        ...

    def release(self, ref: AdapterRef) -> None: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens[start : start + count] of one sequence in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """The chunk reaches the last token, so its logits give the next one."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(slots=True)
class Schedule:
    """What one step computes, and what had to give way."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    prefix_queried: int = 0
    prefix_hit: int = 0

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


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
    ) -> None:
        """`patience`: how many schedules may pass over a sequence whose adapter is not there
        before nothing behind it is admitted any more, so that hot adapters cannot starve it."""
        self.pool = pool
        self.gate = gate
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.patience = patience
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        """Choose the chunks of the next step and give them their blocks."""
        step = Schedule()
        budget = self._continue_running(step, self.max_step_tokens)
        if not step.preempted:
            self._admit_waiting(step, budget)
        return step

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """The step ran: its tokens are in the cache, and full blocks are known prefixes."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.status is Status.RUNNING:
                sequence.computed = chunk.start + chunk.count
                self._remember(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The sequence is over, wherever it was: give back all that it held."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
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
            budget -= count
            index += 1
        return budget

    def _reserve(self, sequence: Sequence, tokens: int, step: Schedule) -> bool:
        """Blocks for the first `tokens` tokens, taken from younger sequences if need be."""
        needed = self.pool.blocks_for(tokens) - len(sequence.blocks)
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
        self.waiting.appendleft(sequence)
        step.preempted.append(sequence)

    def _admit_waiting(self, step: Schedule, budget: int) -> None:
        passed: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._ready(sequence):
                if sequence.skipped > self.patience:
                    break
                passed.append(self.waiting.popleft())
                continue
            count = self._admit(sequence, budget, step)
            if count == 0:
                break
            budget -= count
        self.waiting.extendleft(reversed(passed))

    def _ready(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is not None and not leader.prefilled and not leader.finished:
            return False
        if sequence.adapter is None or sequence.holds_adapter:
            return True
        sequence.holds_adapter = self.gate.acquire(sequence.adapter)
        sequence.skipped += not sequence.holds_adapter
        return sequence.holds_adapter

    def _admit(self, sequence: Sequence, budget: int, step: Schedule) -> int:
        """Start the sequence if blocks for all its tokens are there, and one more for everybody
        who runs: otherwise the next step would only take them away again."""
        hit = self._known_prefix(sequence)
        needed = self.pool.blocks_for(len(sequence.tokens) + 1) - len(hit)
        if not self.pool.can_allocate(needed + self.pool.idle(hit) + len(self.running)):
            return 0
        self.pool.share(hit)
        sequence.blocks = hit + self.pool.allocate(needed)
        sequence.computed = len(hit) * self.pool.block_size
        sequence.remembered = len(hit)
        if not sequence.admitted:
            sequence.admitted, sequence.cached = True, sequence.computed
            step.prefix_queried += sequence.prompt_length
            step.prefix_hit += sequence.computed
        self.waiting.popleft()
        sequence.status, sequence.skipped = Status.RUNNING, 0
        self.running.append(sequence)
        count = min(sequence.uncomputed, budget)
        step.chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of its tokens; the last token is always computed, for its logits."""
        if sequence.request.prompt_logprobs and not sequence.generated:
            return []
        full = (len(sequence.tokens) - 1) // self.pool.block_size
        self._hash_blocks(sequence, full)
        return self.pool.lookup(sequence.hashes[:full])

    def _hash_blocks(self, sequence: Sequence, full: int) -> None:
        size = self.pool.block_size
        for i in range(len(sequence.hashes), full):
            previous = sequence.hashes[-1] if sequence.hashes else sequence.namespace
            sequence.hashes.append(chain_hash(previous, sequence.tokens[i * size : (i + 1) * size]))

    def _remember(self, sequence: Sequence) -> None:
        full = sequence.computed // self.pool.block_size
        self._hash_blocks(sequence, full)
        owner = sequence.adapter.digest if sequence.adapter else ""
        for i in range(sequence.remembered, full):
            self.pool.remember(sequence.blocks[i], sequence.hashes[i], owner)
        sequence.remembered = max(sequence.remembered, full)

    def _release(self, sequence: Sequence) -> None:
        self.pool.deallocate(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.remembered = 0
