"""The KV cache without numbers: a place holds what it stands for, so that a wrong block shows."""

from __future__ import annotations

from service.engine.scheduler import Schedule
from service.engine.sequence import Sequence


class Cells:
    """Runs schedules as the runner would, and checks all that each new token would attend to."""

    def __init__(self, block_size: int) -> None:
        self.size = block_size
        self._held: dict[int, object] = {}

    def run(self, schedule: Schedule) -> None:
        for fill in schedule.fills:
            for i in range(fill.count):
                self._held[fill.block * self.size + i] = (fill.adapter, fill.start + i)
        for chunk in schedule.chunks:
            sequence, first = chunk.sequence, chunk.sequence.virtual_tokens + chunk.start
            for position in range(first, first + chunk.rows):
                meant = _meant(sequence, position, chunk.draft)
                self._held[self._place(sequence, position)] = meant
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            for position in range(sequence.virtual_tokens + chunk.start + chunk.rows):
                held = self._held.get(self._place(sequence, position))
                assert held == _meant(sequence, position, chunk.draft), (sequence.id, position)

    def _place(self, sequence: Sequence, position: int) -> int:
        return sequence.blocks[position // self.size] * self.size + position % self.size


def _meant(sequence: Sequence, position: int, draft: tuple[int, ...]) -> object:
    """A virtual token of the adapter, or a token with all before it and whose they are."""
    token = position - sequence.virtual_tokens
    if token < 0:
        assert sequence.adapter is not None
        return (sequence.adapter.key, position)
    return (sequence.namespace, (*sequence.tokens, *draft)[: token + 1])
