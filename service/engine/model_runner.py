"""Runs the base and the adapters' deltas over one batch. It computes; the scheduler decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import torch

from adapters.delta import LoweredAdapter
from adapters.operator import Segments, SlottedOperator, install
from base import attention_functions
from base.fused import fuse
from base.kernels import Recorder
from base.load import Base
from service.engine import attention
from service.engine.attention import KVCache
from service.engine.batch import Batch
from service.engine.captured import CapturedSteps, StaticBatch, slots_for
from service.engine.prefix import Fill
from service.engine.request import AdapterKey
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence

Resident = Mapping[AdapterKey, LoweredAdapter]


class ModelRunner:
    """Owns the model, swapped for our attention and operator, and the tensors of the KV cache."""

    def __init__(
        self,
        base: Base,
        blocks: int,
        block_size: int,
        kv_dtype: torch.dtype | None = None,
        sizes: Seq[int] = (),
    ) -> None:
        """`kv_dtype`: what keys and values are kept in; None is the base's own dtype. `sizes`: of
        the steps that `capture` is to record, for whose padding there are blocks beyond these."""
        self.base = base
        self.blocks = blocks
        self._sizes = sizes
        kept = kv_dtype or base.dtype
        scratch = -(-max(sizes, default=0) // block_size)
        self.cache = KVCache(base.spec, blocks + scratch, block_size, kept, base.device)
        attention_functions.choose(base.model, attention.NAME)
        self._decoder = fuse(base.model)
        self._operator = install(base.model, base.spec)
        if self._decoder is not None:
            self._operator.places = self._decoder.places
        self._before_head = torch.empty(0)  # [1, L, H] of the last step
        base.model.get_output_embeddings().register_forward_pre_hook(self._keep)
        self.captured: CapturedSteps | None = None
        self.replayed: bool | None = None  # the last step's graph; None: none was captured

    def capture(
        self,
        recorder: Recorder,
        context: int,
        find_fault: Callable[[ModelRunner, int, bool], str],
    ) -> None:
        """Capture steps of sequences of at most `context` tokens; those in which `find_fault`
        finds something are run as they come. Before the first step of the engine."""
        size, rows, device = self.cache.block_size, max(self._sizes), self.base.device
        self.captured = CapturedSteps(
            recorder,
            self._forward_under,
            SlottedOperator(self._operator, slots_for(rows), device),
            StaticBatch(rows, -(-context // size), self.blocks * size, device),
        )
        self.captured.capture(self._sizes, partial(find_fault, self))

    @torch.inference_mode()
    def fill(self, fills: Iterable[Fill], adapters: Resident, cache: KVCache | None = None) -> None:
        """Write virtual tokens of these adapters to their blocks."""
        for part in fills:
            prefix = adapters[part.adapter].prefix
            if prefix is None:
                raise ValueError(f"adapter {part.adapter.digest[:12]} has no virtual tokens")
            span = slice(part.start, part.start + part.count)
            (cache or self.cache).fill(part.block, prefix.keys[:, span], prefix.values[:, span])

    @torch.inference_mode()
    def run(self, batch: Batch, adapters: Resident, cache: KVCache | None = None) -> torch.Tensor:
        """Logits [L, vocabulary] fp32 of the rows that the batch asks for; K and V are written.

        The vocabulary is the largest of the batch's sequences; a row has nothing beyond its own.

        `cache` in place of the engine's own is for a trial run; a step with it is run as it comes,
        never replayed. Raises KeyError when a sequence's adapter is not in `adapters`: never the
        base instead.
        """
        owners = [_owner(chunk.sequence, adapters) for chunk in batch.chunks]
        segments = Segments.of(
            part
            for chunk, owner in zip(batch.chunks, owners, strict=True)
            for part in _parts(chunk, owner)
        )
        if self.captured is not None and cache is None:
            made = self.captured.run(batch, segments)
            self.replayed = made is not None
            if made is not None:
                self._before_head, logits = made
                return logits
        self._operator.segments = segments
        self._operator.logit_segments = Segments.of(
            (1, owner) for owner in _logit_owners(batch, owners)
        )
        return self._attended(batch.to(self.base.device), cache or self.cache).float()

    def _forward_under(
        self, batch: Batch, plans: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [1, L, H], logits [L, vocabulary]) where the operator has these plans."""
        self._operator.plans = plans
        logits = self._attended(batch, self.cache)
        return self._before_head, logits

    def _attended(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        with attention.step(batch, cache) as step:
            logits = self._forward(batch, step)
        if len(step.layers) != self.base.spec.num_layers:
            raise RuntimeError(
                f"{len(step.layers)} of {self.base.spec.num_layers} layers used the paged attention"
            )
        return logits

    def hidden(self, row: int) -> tuple[float, ...]:
        """The hidden state [H] that gave a row of the last step's logits."""
        return tuple(self._before_head[0, row].float().tolist())

    def _keep(self, _head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._before_head = arguments[0]

    def _forward(self, batch: Batch, step: attention.Step) -> torch.Tensor:
        if self._decoder is not None:
            self._decoder.step.adapters = self._operator.adapters
            return self._decoder(
                batch.input_ids, batch.position_ids, batch.logit_rows, step.pages()
            )
        logits: torch.Tensor = self.base.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.logit_rows,
        ).logits[0]
        return logits

    def forget(self, digest: str) -> None:
        """Nothing of this adapter is needed any more: drop the plans that hold its tensors."""
        self._operator.forget(digest)
        if self.captured is not None:
            self.captured.forget(digest)


def _parts(
    chunk: Chunk, owner: LoweredAdapter | None
) -> Iterator[tuple[int, LoweredAdapter | None]]:
    """Tokens of a chunk before the sequence's adapter is active, and those after."""
    before = min(max(chunk.sequence.active_from - chunk.start, 0), chunk.rows)
    yield before, None
    yield chunk.rows - before, owner


def _logit_owners(batch: Batch, owners: Seq[LoweredAdapter | None]) -> list[LoweredAdapter | None]:
    """Whose each row of logits is."""
    found = [owners[i] for i in batch.logit_chunks]
    if not any(chunk.sequence.active_from for chunk in batch.chunks):
        return found
    starts, places = batch.query_start.tolist(), batch.logit_rows.tolist()
    for row, (place, i) in enumerate(zip(places, batch.logit_chunks, strict=True)):
        chunk = batch.chunks[i]
        if chunk.start + place - starts[i] < chunk.sequence.active_from:
            found[row] = None
    return found


def _owner(sequence: Sequence, adapters: Resident) -> LoweredAdapter | None:
    """The sequence's adapter, with the virtual tokens and the vocabulary that it counts on."""
    if sequence.adapter is None:
        return None
    adapter = adapters[sequence.adapter.key]
    found = adapter.prefix.tokens if adapter.prefix else 0
    if found != sequence.virtual_tokens:
        raise ValueError(
            f"adapter {sequence.adapter.name!r} has {found} virtual tokens, and its request says "
            f"{sequence.virtual_tokens}"
        )
    if adapter.vocabulary != sequence.vocabulary:
        raise ValueError(
            f"adapter {sequence.adapter.name!r} knows {adapter.vocabulary} tokens, and its request "
            f"says {sequence.vocabulary}"
        )
    return adapter
