"""What the layers of one forward pass share."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import Tensor

from base.kernels import DecoderHalves, Room, Spans, StepRecord, Steps

_NO_LAYERS: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of a step as far as the C library knows them.

    In the layers of `apart` an adapter does what the tables cannot say: those layers call their
    modules one by one.
    """

    spans: Spans
    apart: Set[int] = _NO_LAYERS


class Step:
    """The C functions, the adapters of the running step, and its record."""

    def __init__(self, steps: Steps, halves: DecoderHalves, hidden: int, inner: int) -> None:
        self.steps = steps
        self.halves = halves
        self.version = 0  # counts the modules that were exchanged
        self._hidden, self._inner = hidden, inner
        self._room = Room()
        self._adapters = Adapters(Spans())
        self._record: StepRecord | None = None
        self._angles: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: object) -> Step:
        """A copy of a fused module shares the step with it."""
        del memo
        return self

    @property
    def adapters(self) -> Adapters:
        return self._adapters

    @adapters.setter
    def adapters(self, adapters: Adapters) -> None:
        """Whose the tokens of the next forward pass are."""
        self._adapters = adapters
        self._record = None

    def record(self, angles: tuple[Tensor, Tensor]) -> StepRecord:
        """For cos and sin [.., T, dim]; made again only when another pair comes."""
        if self._record is None or self._angles is not angles:
            self._angles = angles
            self._record = self.fresh_record(angles)
        return self._record

    def fresh_record(self, angles: tuple[Tensor, Tensor]) -> StepRecord:
        cos, sin = (t.contiguous() for t in angles)
        return StepRecord(cos, sin, self._adapters.spans, self._hidden, self._inner, self._room)
