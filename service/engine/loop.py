"""The engine: one thread that schedules, runs, samples and delivers, step after step.

Other threads talk to it through `submit`, `cancel` and a few more, which post commands; it answers
through streams and futures. Nothing else touches the scheduler, the blocks or the slots.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from adapters.delta import LoweredAdapter
from base.kernels import recorder_for
from base.load import Base
from service.engine.batch import Batch, build_batch
from service.engine.capture_check import find_fault
from service.engine.captured import sizes_for
from service.engine.config import EngineConfig
from service.engine.detokenizer import Detokenizer
from service.engine.door import Door
from service.engine.kv_cache import BlockPool
from service.engine.loading import Loading
from service.engine.mailbox import Mailbox
from service.engine.model_runner import ModelRunner
from service.engine.observer import Observer, Silent, StepReport
from service.engine.output import Output
from service.engine.request import (
    AdapterKey,
    AdapterRef,
    FinishReason,
    Request,
)
from service.engine.sampler import Sampled, Sampler
from service.engine.scheduler import Chunk, Schedule, Scheduler
from service.engine.sequence import Sequence
from service.engine.speculation import Drafter
from service.engine.stream import Stream
from service.engine.trial import try_out
from service.engine.vocabulary import Vocabulary
from service.errors import (
    AdapterLoadFailed,
    EngineFailed,
    GenerationFailed,
    InvalidRequest,
    ServiceError,
)
from service.residency.tiers import Fetch, LoadReport, Resident, Tiers

log = logging.getLogger(__name__)


class Engine:
    """Serves requests over one base; see the module's docstring for who may call what."""

    def __init__(
        self, base: Base, fetch: Fetch, config: EngineConfig, observer: Observer | None = None
    ) -> None:
        """`fetch` turns an AdapterRef into a LoweredAdapter; it runs in a worker thread."""
        self.base = base
        self.config = config
        blocks = config.blocks_for(base)
        self.max_model_len = min(
            base.spec.max_positions,
            config.max_model_len or base.spec.max_positions,
            blocks * config.block_size,
        )
        self._observer = observer or Silent()
        self._thread = threading.Thread(target=self._main, name="nibble-engine", daemon=True)
        self._door = Door(config.max_waiting, config.max_waiting_tokens)
        self._mailbox = Mailbox(self._thread, lambda: self._door.failure)
        recorder = recorder_for(base.device) if config.cuda_graphs == "auto" else None
        sizes = sizes_for(config.max_sequences) if recorder else ()
        kept = config.kept_dtype(base)
        self._runner = ModelRunner(base, blocks, config.block_size, kept, sizes)
        if recorder is not None:
            self._runner.capture(recorder, self.max_model_len, find_fault)
        self._tiers = Tiers(
            fetch,
            self._mailbox.post,
            self._observer,
            left=self._runner.forget,
            host_bytes=config.host_cache_bytes,
            slot_bytes=config.slot_bytes,
            device=base.device,
            max_loads=config.max_loads,
            workers=config.load_workers,
        )
        self._pool = BlockPool(blocks, config.block_size)
        self._scheduler = Scheduler(
            self._pool,
            self._tiers,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens,
        )
        self._sampler = Sampler(base.eos_token_ids, base.spec.vocab_size)
        self._vocabulary = Vocabulary.of_base(base.tokenizer, base.eos_token_ids)
        self._live: dict[int, Output] = {}
        self._loading = Loading(self._tiers, self._mailbox, self._door)
        self._ids = 0
        self._accepted = 0  # tokens of drafts, in this step
        self._stopping = False
        self._report = StepReport(0, 0, 0, blocks, 0, 0, 0, 0, 0, 0.0)

    # From any thread.

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._door.failure is None

    @property
    def waiting(self) -> int:
        """Sequences that wait, at this moment: `stats` has those of the last step."""
        return self._door.waiting

    def waiting_of(self, tenant: str) -> int:
        """Those of one tenant."""
        return self._door.waiting_of(tenant)

    def share_queue(self, when: Callable[[], bool]) -> None:
        """As long as `when` says so, one tenant gets as much of the queue as it leaves for others:
        what is more is refused with QuotaExceeded."""
        self._door.shared = when

    @property
    def kv_cache_bytes(self) -> int:
        return self._runner.cache.nbytes

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End at once: what still runs finishes as cancelled."""
        self._mailbox.post(self._stop)
        if self._thread.is_alive():
            self._thread.join()
        self._tiers.close()

    def drain(self, timeout: float | None = None) -> bool:
        """Admit nothing more and wait until nothing runs; False when `timeout` seconds pass."""
        self._door.drain()
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.alive and self._mailbox.ask(lambda: bool(self._live)):
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def submit(self, request: Request) -> Stream:
        """Queue the request. Raises InvalidRequest, Overloaded, QuotaExceeded, Draining,
        EngineFailed or AdapterNotFound, and then nothing of it remains."""
        self._check(request)
        with self.reserved(request.adapter):
            return self._submit(request)

    def reserved(self, ref: AdapterRef | None) -> AbstractContextManager[None]:
        """Within it the adapter is on its way to memory: see `Loading.reserved`."""
        return self._loading.reserved(ref)

    def _submit(self, request: Request) -> Stream:
        request_ids: list[int] = []
        stream = Stream(
            request.n,
            lambda: self._mailbox.post(lambda: self._cancel(request_ids)),
            request.streamed,
        )
        with self._door.lock:
            self._door.enter(request.adapter, request.n, len(request.prompt), request.tenant)
            if request.adapter is not None:
                self._tiers.claims.take(request.adapter, request.n)
            # Within the door, so that an engine that closes it still sees the request.
            submitted = time.perf_counter()
            self._mailbox.post(lambda: self._enter(request, stream, request_ids, submitted))
        return stream

    def load(self, ref: AdapterRef, *, timeout: float = 600.0) -> LoadReport:
        """Bring the adapter to a slot and say what it cost. Raises AdapterLoadFailed, and what
        `reserved` raises."""
        return self._loading.load(ref, timeout)

    def pin(self, ref: AdapterRef) -> None:
        """Load the adapter and keep it in its slot."""
        self.load(ref)
        self._loading.pin(ref, True)

    def unpin(self, ref: AdapterRef) -> None:
        """The slot may be given away again. Raises KeyError when there is none."""
        self._loading.pin(ref, False)

    def forget(self, digest: str) -> None:
        """Admit nothing more for the digest, let what runs end, free slot and blocks, return."""
        self._loading.forget(digest)

    def probe(self, adapter: LoweredAdapter) -> None:
        """Run an adapter that is not served yet over two tokens, between two steps.

        Raises InvalidAdapter: see `try_out`.
        """
        adapter = adapter.to(self.base.device)
        self._mailbox.ask(lambda: try_out(self._runner, adapter, self.max_model_len))

    def residents(self, digest: str | None = None) -> list[Resident]:
        return self._loading.residents(digest)

    def tally(self) -> dict[str, tuple[int, int]]:
        """Adapters and their bytes by tier."""
        return self._loading.tally()

    def stats(self) -> StepReport:
        """The last step, as the observer saw it."""
        return self._report

    def check_integrity(self) -> None:
        """Raise AssertionError when blocks, slots or queues do not add up."""
        self._mailbox.ask(self._check_integrity)

    def _check(self, request: Request) -> None:
        length = len(request.prompt)
        virtual = request.adapter.virtual_tokens if request.adapter else 0
        limit = self.max_model_len - virtual
        if length == 0:
            raise InvalidRequest("the prompt has no tokens; give at least one", "inputs")
        if length >= limit:
            behind = f", behind {virtual} virtual tokens of the adapter" if virtual else ""
            raise InvalidRequest(
                f"the prompt has {length} tokens; prompt and output together have room for "
                f"{limit}{behind}, so at most {limit - 1}",
                "inputs",
            )
        top, least = max(request.prompt), min(request.prompt)
        known = (request.adapter and request.adapter.vocabulary) or self.base.spec.vocab_size
        if top >= known or least < 0:
            wrong = least if least < 0 else top
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {known}", "inputs")

    # The engine's thread.

    def _main(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                self._step()
        except Exception as error:
            log.exception("the engine failed")
            self._door.fail(f"the engine failed: {type(error).__name__}: {error}")
        finally:
            failure = self._door.failure
            self._end_all(EngineFailed(failure) if failure else None)

    def _step(self) -> None:
        """Schedule, run, sample, deliver."""
        started = time.perf_counter()
        self._accepted = 0
        step = self._scheduler.schedule()
        failures = self._tiers.take_failures()
        self._end_failed(failures)
        self._loading.answer(failures)
        self._note_scheduled(step)
        generated = self._run(step) if step.chunks else 0
        self._loading.forget_drained(self._pool.forget)
        self._tell(step, generated, time.perf_counter() - started)

    def _run(self, step: Schedule) -> int:
        try:
            return self._compute(step, step.chunks)
        except Exception as error:
            return self._run_apart(step, error)

    def _run_apart(self, step: Schedule, error: Exception) -> int:
        """The step raised: run it adapter by adapter, so that only the guilty one's requests end.

        Computing a chunk twice is harmless, since keys and values land in the same places. When
        every group fails it is the engine's own fault.
        """
        groups: dict[AdapterKey | None, list[Chunk]] = {}
        for chunk in step.chunks:
            ref = chunk.sequence.adapter
            if not chunk.sequence.finished:
                plain = replace(chunk, draft=())
                groups.setdefault(ref.key if ref else None, []).append(plain)
        if len(groups) == 1 and None in groups:
            raise error
        log.warning("a step failed and is run again adapter by adapter: %s", error)
        generated = 0
        for key, chunks in groups.items():
            try:
                generated += self._compute(step, chunks)
            except Exception as fault:
                if key is None:
                    raise
                self._pool.forget(key.digest)  # its virtual tokens may not have been written
                for chunk in chunks:
                    self._end(
                        chunk.sequence, "error", GenerationFailed(f"the adapter failed: {fault}")
                    )
        return generated

    def _compute(self, step: Schedule, chunks: Iterable[Chunk]) -> int:
        batch = build_batch(list(chunks), self.config.block_size)
        adapters = {
            ref.key: self._tiers.adapter(ref.key)
            for chunk in batch.chunks
            if (ref := chunk.sequence.adapter) is not None
        }
        # Before the run, which may already share what is written.
        self._runner.fill((f for f in step.fills if f.adapter in adapters), adapters)
        logits = self._runner.run(batch, adapters)
        self._scheduler.computed(batch.chunks)
        return self._deliver(batch, logits)

    def _deliver(self, batch: Batch, logits: torch.Tensor) -> int:
        """Sample the rows that reach the end of their sequence, and those of its draft as long as
        that is right; send the tokens. Returns how many."""
        generated, turn = 0, 0
        going = self._sampled_rows(batch, logits)
        while going:
            places = [rows[turn] for _, rows in going]
            part = logits if len(places) == len(logits) else logits[places]
            choices = self._sampler.sample(part, [chunk.sequence for chunk, _ in going])
            generated += len(going)
            going = [
                (chunk, rows)
                for (chunk, rows), choice in zip(going, choices, strict=True)
                if self._take(chunk, turn, rows[turn], choice)
            ]
            turn += 1
        for chunk in batch.chunks:
            self._scheduler.verified(chunk)
        return generated

    def _sampled_rows(self, batch: Batch, logits: torch.Tensor) -> list[tuple[Chunk, list[int]]]:
        """The rows of logits that give tokens, by chunk. Those of prompts are scored."""
        starts = batch.query_start.tolist()
        found: dict[int, list[int]] = {}
        for row, (place, owner) in enumerate(
            zip(batch.logit_rows.tolist(), batch.logit_chunks, strict=True)
        ):
            chunk = batch.chunks[owner]
            position = chunk.start + place - starts[owner]
            if position + 1 >= len(chunk.sequence.tokens):
                found.setdefault(owner, []).append(row)
            else:
                own = self._sampler.own(logits[row], chunk.sequence)
                self._live[chunk.sequence.id].score(position + 1, own)
        return [(batch.chunks[owner], rows) for owner, rows in found.items()]

    def _take(self, chunk: Chunk, turn: int, row: int, choice: Sampled | None) -> bool:
        """The token that a row gave, the chunk's last or number `turn` of its draft: does the next
        row stand on what is true?"""
        sequence = chunk.sequence
        output = self._live[sequence.id]
        if turn == 0:
            output.draft_tokens += len(chunk.draft)
        if sequence.request.pooled:
            output.hidden = self._runner.hidden(row)
        guess = chunk.draft[turn] if turn < len(chunk.draft) else None
        right = choice is not None and choice.token == guess
        output.accepted_tokens += right
        self._accepted += right
        self._accept(output, choice)
        if not right or sequence.finished:
            return False
        self._scheduler.accepted(sequence)
        return True

    def _accept(self, output: Output, choice: Sampled | None) -> None:
        """One more token: keep it, send it, and end the sequence if it is the last."""
        sequence = output.sequence
        if choice is None:
            fault = "the logits are not finite; the adapter is at fault"
            self._end(sequence, "error", GenerationFailed(fault))
            return
        if sequence.walk is not None and not sequence.walk.advance(choice.token):
            fault = f"the grammar of the output went past its bounds: {sequence.walk.fault}"
            self._end(sequence, "error", GenerationFailed(fault))
            return
        sequence.tokens.append(choice.token)
        special = choice.token in output.vocabulary.special
        text = output.detokenizer.push(choice.token, special)
        reason = self._end_of(output, choice.token)
        first, seconds = output.tick()
        (self._observer.first_token if first else self._observer.inter_token)(seconds)
        output.send(choice, text, special=special, last=reason is not None)
        if reason is not None:
            self._end(sequence, reason)

    def _end_of(self, output: Output, token: int) -> FinishReason | None:
        sequence = output.sequence
        sampling = sequence.request.sampling
        if sequence.generated >= sampling.min_new_tokens:
            if token in sampling.stop_token_ids:
                return "eos_token"
            if token in self.base.eos_token_ids and not sampling.ignore_eos:
                return "eos_token"
        if output.detokenizer.stopped:
            return "stop_sequence"
        if sequence.walk is not None and sequence.walk.complete:
            return "eos_token"
        if sequence.generated >= sampling.max_new_tokens:
            return "length"
        length = sequence.virtual_tokens + len(sequence.tokens)
        return "length" if length >= self.max_model_len else None

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: ServiceError | None = None
    ) -> None:
        output = self._live.pop(sequence.id)
        self._scheduler.finish(sequence)
        if sequence.adapter is not None:
            self._tiers.claims.drop(sequence.adapter)
        if not output.scheduled:
            self._door.leave_queue(sequence.prompt_length, sequence.request.tenant)
        finished = output.end(reason, error)
        self._observer.finished(finished, time.perf_counter() - output.submitted)

    def _end_all(self, error: ServiceError | None) -> None:
        """Close the door, then end what came through it: with an error, or as cancelled."""
        self._door.fail("the engine has stopped")
        self._mailbox.run_all()
        for output in list(self._live.values()):
            self._end(output.sequence, "error" if error else "cancelled", error)
        self._loading.end()

    def _end_failed(self, failures: Mapping[AdapterKey, str]) -> None:
        """Sequences that waited for an adapter that could not be loaded."""
        for sequence in [output.sequence for output in self._live.values()]:
            ref = sequence.adapter
            if ref is not None and ref.key in failures and not sequence.holds_adapter:
                self._end(sequence, "error", AdapterLoadFailed(failures[ref.key]))

    # Commands: run in the engine's thread, between two steps.

    def _take_commands(self) -> None:
        """All that have come; when there is nothing to compute, wait for the next one."""
        if not self._scheduler.running and not self._stopping:
            # Who waits while nothing runs waits for an adapter, which posts.
            waits = self._scheduler.waiting or self._loading.waits
            self._mailbox.run_next(0.2 if waits else None)
        self._mailbox.run_all()

    def _enter(self, request: Request, stream: Stream, ids: list[int], submitted: float) -> None:
        sampling = request.sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        leader: Sequence | None = None
        if request.adapter is not None:
            self._tiers.seek(request.adapter)
        for index in range(request.n):
            self._ids += 1
            sequence = Sequence(
                id=self._ids,
                request=request,
                index=index,
                seed=seed + index,
                tokens=list(request.prompt),
                prompt_length=len(request.prompt),
                namespace=self._namespace(request),
                leader=leader,
                walk=sampling.guide.start() if sampling.guide else None,
                drafter=self._drafter(request),
            )
            leader = leader or sequence
            ids.append(sequence.id)
            words = request.vocabulary or self._vocabulary
            detokenizer = Detokenizer(words.tokenizer, sampling.stop)
            self._live[sequence.id] = Output(sequence, stream, words, detokenizer, submitted)
            self._scheduler.add(sequence)

    def _drafter(self, request: Request) -> Drafter | None:
        if not request.prompt_lookup_num_tokens:
            return None
        virtual = request.adapter.virtual_tokens if request.adapter else 0
        limit = len(request.prompt) + request.sampling.max_new_tokens
        return Drafter(request.prompt_lookup_num_tokens, min(limit, self.max_model_len - virtual))

    def _namespace(self, request: Request) -> bytes:
        """What the prefix cache is keyed by beside the tokens, so that no block is ever shared
        between tenants, adapters or placements."""
        key = request.adapter.key if request.adapter else ()
        where = (str(request.active_from),) if request.active_from else ()
        parts = (request.tenant, self.base.spec.fingerprint, *key, *where)
        return b"".join(len(p.encode()).to_bytes(4, "little") + p.encode() for p in parts)

    def _cancel(self, ids: Iterable[int]) -> None:
        for sequence_id in list(ids):
            output = self._live.get(sequence_id)
            if output is not None:
                self._end(output.sequence, "cancelled")

    def _stop(self) -> None:
        self._stopping = True

    # What others see.

    def _note_scheduled(self, step: Schedule) -> None:
        now = time.perf_counter()
        for chunk in step.chunks:
            output = self._live[chunk.sequence.id]
            if not output.scheduled:
                output.scheduled = now
                sequence = chunk.sequence
                self._door.leave_queue(sequence.prompt_length, sequence.request.tenant)

    def _tell(self, step: Schedule, generated: int, seconds: float) -> None:
        scheduler = self._scheduler
        prompt = sum(
            max(min(c.start + c.count, c.sequence.prompt_length) - c.start, 0) for c in step.chunks
        )
        self._report = StepReport(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=self._pool.used,
            blocks_total=self._pool.total,
            prompt_tokens=prompt,
            generated_tokens=generated,
            preempted=len(step.preempted),
            prefix_queried=step.prefix_queried,
            prefix_hit=step.prefix_hit,
            seconds=seconds,
            drafts=sum(bool(chunk.draft) for chunk in step.chunks),
            draft_tokens=sum(len(chunk.draft) for chunk in step.chunks),
            accepted_tokens=self._accepted,
            replayed=self._runner.replayed if step.chunks else None,
            running_adapters=_names(scheduler.running),
            waiting_adapters=_names(scheduler.waiting),
        )
        if all(chunk.count == 1 for chunk in step.chunks):
            scheduler.pace.note(step.tokens, seconds)
        self._observer.stepped(self._report)

    def _check_integrity(self) -> None:
        self._pool.check_integrity()
        self._tiers.check_integrity()
        living = [*self._scheduler.running, *self._scheduler.waiting]
        assert {s.id for s in living} == set(self._live)
        assert self._pool.references() == sum(len(s.blocks) for s in living)
        held = sum(s.holds_adapter for s in living)
        assert held == sum(slot.references for _, slot in self._tiers.slots.items())


def _names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({s.adapter.name for s in sequences if s.adapter is not None}))
