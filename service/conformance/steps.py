"""Rows of logits out of a running engine: together in one batch, or alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.engine.attention import KVCache
from service.engine.batch import Batch
from service.engine.loop import Engine
from service.engine.model_runner import Resident
from service.engine.request import AdapterRef, Finished, Request, Sampling, Token

_PATIENCE = 300.0  # seconds for one event


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of a batch."""

    prompt: tuple[int, ...]
    ref: AdapterRef | None


@dataclass(frozen=True, slots=True)
class Answered:
    """Its greedy tokens, and the logits [tokens, vocabulary] that chose them."""

    tokens: list[int]
    logits: torch.Tensor


class Steps:
    """Watches the forward passes of an engine: logits by request, rows, CPU seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._run = engine._runner.run
        engine._runner.run = self._watch  # type: ignore[method-assign]
        self._logits: dict[str, list[torch.Tensor]] = {}
        self._everyone = threading.Event()
        self._everyone.set()
        self._requests = 0
        self.widest = 0  # sequences in one step
        self.seconds: list[tuple[int, float]] = []  # of each step: sequences, CPU seconds

    def _watch(
        self, batch: Batch, adapters: Resident, cache: KVCache | None = None
    ) -> torch.Tensor:
        # The first step waits until all requests of the batch are in, so that they run together.
        self._everyone.wait(_PATIENCE)
        started = time.process_time()
        logits = self._run(batch, adapters, cache)
        self.seconds.append((len(batch.chunks), time.process_time() - started))
        self.widest = max(self.widest, len(batch.chunks))
        for row, owner in enumerate(batch.logit_chunks):
            sequence = batch.chunks[owner].sequence
            if sequence.request.id in self._logits:
                own = sequence.vocabulary or self._engine.base.spec.vocab_size
                self._logits[sequence.request.id].append(logits[row, :own].clone())
        return logits

    def together(self, asked: Sequence[Asked], tokens: int) -> list[Answered]:
        """All of them at once, in as few steps as the engine's limits allow."""
        for one in asked:
            if one.ref is not None:  # who is still on the way to memory would join too late
                self._engine.load(one.ref)
        options = Sampling(max_new_tokens=tokens, ignore_eos=True)
        self._everyone.clear()
        running = []
        try:
            for one in asked:
                self._requests += 1
                request = Request(f"c{self._requests}", one.prompt, options, one.ref)
                self._logits[request.id] = []
                running.append((request.id, self._engine.submit(request)))
        finally:
            self._everyone.set()
        answers = []
        for ident, stream in running:
            found: list[int] = []
            for event in stream.iterate(_PATIENCE):
                if isinstance(event, Token):
                    found.append(event.id)
                elif isinstance(event, Finished) and event.error is not None:
                    raise event.error
            answers.append(Answered(found, torch.stack(self._logits.pop(ident))))
        return answers

    def alone(self, asked: Asked, tokens: int) -> Answered:
        return self.together([asked], tokens)[0]

    def decode_seconds(self, asked: Sequence[Asked], tokens: int) -> float:
        """CPU seconds of the cheapest step in which each of the rows got one token."""
        self.seconds.clear()
        self.together(asked, tokens)
        return min(seconds for rows, seconds in self.seconds[1:] if rows == len(asked))
