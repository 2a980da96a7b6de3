"""Where the names of a plot's points stand: beside them, and on no other name or point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHARACTER, ASCENT, DESCENT = 6.0, 9.0, 3.0  # of the page's text of 11 pixels
_NEAR = ((0.0, -9.0), (0.0, 17.0), (1.0, 4.0), (-1.0, 4.0))  # side: 1 right, -1 left; baseline
_ROW = 13.0


@dataclass(frozen=True, slots=True)
class Label:
    """A name's left end and baseline; `far` from its point, where a line has to lead to it."""

    x: float
    y: float
    width: float
    far: bool = False

    def covers(self, other: Label) -> bool:
        """Do the two overlap?"""
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and abs(self.y - other.y) < ASCENT + DESCENT
        )

    def hides(self, point: tuple[float, float], radius: float) -> bool:
        x, y = point
        across = self.x - radius < x < self.x + self.width + radius
        return across and self.y - ASCENT - radius < y < self.y + DESCENT + radius


def labels(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    box: tuple[float, float, float, float],
) -> list[Label]:
    """One for each point, within `box` (left, top, right, bottom); the crowded ones choose first.

    Each takes the nearest place where it is on nothing, or the one where it is on least.
    """
    crowd = [sum(abs(x - a) < 60 and abs(y - b) < 30 for a, b in points) for x, y in points]
    found: dict[int, Label] = {}
    for index in sorted(range(len(points)), key=lambda i: (-crowd[i], points[i])):
        choices = list(_places(points[index], CHARACTER * len(names[index]), box))

        def cost(choice: tuple[int, Label]) -> tuple[int, int]:
            order, label = choice
            on = sum(label.covers(other) for other in found.values())
            return 4 * on + sum(label.hides(point, 4.0) for point in points), order

        found[index] = min(enumerate(choices), key=cost)[1]
    return [found[index] for index in range(len(points))]


def _places(
    point: tuple[float, float], width: float, box: tuple[float, float, float, float]
) -> Iterator[Label]:
    """The nearest first; all of them are inside, but where none can be."""
    left, top, right, bottom = box
    x, y = point
    tried = [(side, dy, False) for side, dy in _NEAR]
    for rows in range(1, 15):
        tried += [(side, -9 - rows * _ROW, True) for side in (0.0, 1.0, -1.0)]
        tried += [(side, 17 + rows * _ROW, True) for side in (0.0, 1.0, -1.0)]
    inside = False
    for side, dy, far in tried:
        start = x + 9 if side > 0 else x - 9 - width if side < 0 else x - width / 2
        label = Label(min(max(start, left), right - width), y + dy, width, far)
        beside = side == 0 or far or label.x == start
        if beside and top <= label.y - ASCENT and label.y + DESCENT <= bottom:
            inside = True
            yield label
    if not inside:
        yield Label(x, y - 9, width)
