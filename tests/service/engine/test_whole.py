"""Scheduler, blocks and slots together, without a model, under any order of events.

Submit, step, cancel, upload, replace, delete: free + used = total for blocks and for slot bytes,
nothing leaks, nothing starves, and no sequence ever runs with another adapter than its own.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from adapters.delta import LinearDelta, LoweredAdapter, LowRank, Prefix
from service.engine.kv_cache import BlockPool
from service.engine.observer import Silent
from service.engine.request import AdapterRef, Request, Sampling
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.residency.tiers import Tiers
from tests.service.engine.cells import Cells
from tests.waiting import PATIENCE

NAMES = ("a", "b", "c", "d")
BLOCK, BLOCKS = 4, 16
UNIT = 64  # bytes of the smallest adapter


class Whole(RuleBasedStateMachine):
    """The engine's thread without the model: the same calls in the same order."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.store: dict[str, LoweredAdapter] = {}  # by digest
        self.names: dict[str, str] = {}  # name -> digest
        self.uploads = 0
        self.tiers = Tiers(
            self.fetch,
            self.commands.put,
            Silent(),
            left=lambda digest: None,
            host_bytes=3 * UNIT,
            slot_bytes=4 * UNIT,
            device=torch.device("cpu"),
        )
        self.pool = BlockPool(BLOCKS, BLOCK)
        self.scheduler = Scheduler(
            self.pool, self.tiers, max_sequences=4, max_step_tokens=10, patience=3
        )
        self.living: list[Sequence] = []
        self.forgotten: set[str] = set()
        self.cells = Cells(BLOCK)
        self.numbers = 0

    def teardown(self) -> None:
        self.tiers.close()

    def fetch(self, ref: AdapterRef) -> LoweredAdapter:
        return self.store[ref.digest]

    @rule(
        name=st.sampled_from(NAMES),
        units=st.integers(1, 4),
        virtual=st.sampled_from([0, 0, 3, 8, 21]),
    )
    def upload_or_replace(self, name: str, units: int, virtual: int) -> None:
        self.uploads += 1
        digest = f"{self.uploads:064d}"
        if virtual:
            prefix = Prefix(torch.zeros(1, virtual, 1, 1), torch.zeros(1, virtual, 1, 1))
            adapter = LoweredAdapter(digest, "cartridge", "unmerged", {}, prefix=prefix)
        else:
            half = UNIT * units // 8
            term = LowRank(torch.zeros(1, half), torch.zeros(half, 1))
            adapter = LoweredAdapter(digest, "lora", "unmerged", {"x": LinearDelta((term,))})
        self.store[digest] = adapter
        self.names[name] = digest

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        digest = self.names.pop(name, None)
        if digest is not None:
            self.forgotten.add(digest)

    @rule(
        target=sequences,
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=BLOCK * BLOCKS - 1),
        most=st.integers(1, 12),
        name=st.sampled_from([None, *NAMES]),
    )
    def submit(self, prompt: list[int], most: int, name: str | None) -> Sequence:
        digest = self.names.get(name) if name else None
        ref = None
        if digest and name:
            prefix = self.store[digest].prefix
            ref = AdapterRef(digest, name, virtual_tokens=prefix.tokens if prefix else 0)
            prompt = prompt[: BLOCK * BLOCKS - 1 - ref.virtual_tokens]
        self.numbers += 1
        request = Request(str(self.numbers), tuple(prompt), Sampling(max_new_tokens=most), ref)
        sequence = Sequence(
            self.numbers, request, 0, 0, list(prompt), len(prompt), (digest or "").encode()
        )
        if ref is not None:
            self.tiers.claims.take(ref)
        self.scheduler.add(sequence)
        self.living.append(sequence)
        return sequence

    @rule(sequence=sequences)
    def cancel(self, sequence: Sequence) -> None:
        if sequence in self.living:
            self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        if sequence.adapter is not None:
            self.tiers.claims.drop(sequence.adapter)
        self.living.remove(sequence)

    @rule()
    def step(self) -> None:
        """One turn of the engine's loop."""
        if len(self.tiers.loads):
            self.commands.get(timeout=PATIENCE)()  # what a worker has brought
        schedule = self.scheduler.schedule()
        assert self.tiers.take_failures() == {}, "all of these adapters can be loaded"
        for chunk in schedule.chunks:
            ref = chunk.sequence.adapter
            if ref is not None:
                assert self.tiers.adapter(ref.key).digest == ref.digest
        for fill in schedule.fills:
            prefix = self.tiers.adapter(fill.adapter).prefix
            assert prefix is not None
            assert fill.start + fill.count <= prefix.tokens
        self.cells.run(schedule)
        self.scheduler.computed(schedule.chunks)
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if chunk.samples:
                sequence.tokens.append(sequence.generated % 2)
                if (
                    sequence.generated >= sequence.request.sampling.max_new_tokens
                    or sequence.virtual_tokens + len(sequence.tokens) >= BLOCK * BLOCKS
                ):
                    self.end(sequence)
        self.forget_drained()

    def forget_drained(self) -> None:
        busy = {s.adapter.digest for s in self.living if s.adapter}
        for digest in self.forgotten - busy:
            self.tiers.forget(digest)
            self.pool.forget(digest)
            self.forgotten.discard(digest)
            assert all(r.digest != digest for r in self.tiers.residents())

    @precondition(lambda self: self.living)
    @rule()
    def everything_ends(self) -> None:
        work = sum(len(s.tokens) + s.request.sampling.max_new_tokens for s in self.living)
        for _ in range(100 + 20 * work):
            if not self.living:
                break
            self.step()
        assert not self.living
        assert self.pool.used == 0
        assert not self.forgotten

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity()
        self.tiers.slots.check_integrity()
        held = sum(s.holds_adapter for s in self.living)
        assert held == sum(slot.references for _, slot in self.tiers.slots.items())
        assert self.pool.references() == sum(len(s.blocks) for s in self.living)
        host = self.tiers.host
        assert host.allocated == sum(nbytes for _, nbytes in host.items()) <= host.budget


Whole.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestWhole = Whole.TestCase
