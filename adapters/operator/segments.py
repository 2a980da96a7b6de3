"""Which rows of a step belong to which adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from adapters.delta import LoweredAdapter


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Rows [start, stop) of one step use `adapter`; None is the base alone."""

    start: int
    stop: int
    adapter: LoweredAdapter | None


class Segments:
    """The segmentation of one step's rows: adjacent rows of one adapter are one segment.

    Segments must follow each other from row 0 without a gap; empty ones are dropped.
    """

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        merged: list[Segment] = []
        row = 0
        for segment in segments:
            if segment.start != row or segment.stop < segment.start:
                raise ValueError(
                    f"segment [{segment.start}, {segment.stop}) must start at row {row} "
                    "and must not end before it starts"
                )
            row = segment.stop
            if segment.start == segment.stop:
                continue
            if merged and merged[-1].adapter is segment.adapter:
                merged[-1] = Segment(merged[-1].start, segment.stop, segment.adapter)
            else:
                merged.append(segment)
        self._segments = tuple(merged)
        self.rows = row

    @classmethod
    def of(cls, counts: Iterable[tuple[int, LoweredAdapter | None]]) -> Segments:
        """From (number of rows, adapter) pairs in the order of the rows."""
        segments, row = [], 0
        for count, adapter in counts:
            segments.append(Segment(row, row + count, adapter))
            row += count
        return cls(segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def plain(self) -> bool:
        """Does every row use the base alone?"""
        return all(segment.adapter is None for segment in self._segments)

    @property
    def key(self) -> tuple[tuple[int, int], ...]:
        """Equal for two live segmentations exactly when they are the same."""
        return tuple((s.stop, 0 if s.adapter is None else id(s.adapter)) for s in self._segments)
