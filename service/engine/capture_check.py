"""Does a captured step give what the same step gives as it comes? Asked once for each size, before
the engine serves: its blocks hold nothing yet."""

from __future__ import annotations

import random

import torch

from adapters.delta import LinearDelta, LoweredAdapter, LowRank
from base.load import Base
from service.engine.batch import Batch, build_batch
from service.engine.model_runner import ModelRunner
from service.engine.request import AdapterRef, Request
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence

_BOUND = 5e-2  # of a row of logits, in the norm; of another row or adapter it is about 1
_RANK = 8
_DIGESTS = ("captured-step-0", "captured-step-1")


def find_fault(runner: ModelRunner, size: int, adapted: bool) -> str:
    """What is wrong with the captured step of a size, or nothing. Writes to some of the blocks."""
    adapters = _adapters(runner.base) if adapted else {}
    sequences = _sequences(runner, size, list(adapters))
    block_size = runner.cache.block_size
    longer = [s for s in sequences if len(s.tokens) > 1]
    prompts = [Chunk(s, 0, len(s.tokens) - 1) for s in longer]
    resident = {ref.key: adapter for ref, adapter in adapters.items()}
    if prompts:
        runner.run(build_batch(prompts, block_size), resident, runner.cache)
    batch: Batch = build_batch([Chunk(s, len(s.tokens) - 1, 1) for s in sequences], block_size)
    wanted = runner.run(batch, resident, runner.cache)
    found = runner.run(batch, resident)
    for digest in _DIGESTS:
        runner.forget(digest)
    if not runner.replayed:
        return "it was not replayed"
    error = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    return "" if error < _BOUND else f"its logits are off by {error:.2g}"


def _sequences(runner: ModelRunner, size: int, refs: list[AdapterRef]) -> list[Sequence]:
    """One less than `size`, so that there is a row of nobody, with blocks in no order."""
    chance, blocks = random.Random(size), runner.blocks
    count = min(max(size - 1, 1), blocks)
    each = 2 if blocks >= 2 * count else 1
    free = chance.sample(range(blocks), each * count)
    longest = min(each * runner.cache.block_size, runner.base.spec.max_positions)
    made = []
    for number in range(count):
        length = chance.randint(1, longest)
        prompt = tuple(chance.randrange(runner.base.spec.vocab_size) for _ in range(length))
        adapter = chance.choice([None, *refs]) if number else next(iter(refs), None)
        request = Request(str(number), prompt, adapter=adapter)
        sequence = Sequence(number, request, 0, 0, list(prompt), length, b"")
        sequence.blocks = [free.pop() for _ in range(each)]
        made.append(sequence)
    return made


def _adapters(base: Base) -> dict[AdapterRef, LoweredAdapter]:
    chance = torch.Generator().manual_seed(0)
    dtype = base.dtype if base.dtype is torch.bfloat16 else torch.float32

    def draw(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=chance).mul_(float(columns) ** -0.5)
        return drawn.to(base.device, dtype)

    made = {}
    for digest in _DIGESTS:
        deltas = {
            path: LinearDelta((LowRank(draw(_RANK, s.in_features), draw(s.out_features, _RANK)),))
            for path, s in base.spec.linears.items()
        }
        adapter = LoweredAdapter(digest, "lora", "unmerged", deltas, _RANK)
        made[AdapterRef(digest, digest)] = adapter
    return made
