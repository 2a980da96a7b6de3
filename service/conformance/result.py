"""What one kind showed on one base: a cell for each check, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

CHECKS: Mapping[str, str] = {
    "isolation": "each row of a mixed batch of 16 equals the same row alone",
    "peft": "greedy tokens and logits equal PEFT's alone, in fp32",
    "reload": "dropped from memory and loaded again, it gives the same bits",
    "merged": "private merged weights in float32 give what the unmerged adapter gives",
    "zero": "as PEFT initialises it, it is the base",
    "round_trip": "saved by PEFT, uploaded and served over HTTP, token for token as PEFT",
}
BOUND = 1e-4  # of logits, relative to the largest

Status = Literal["pass", "fail", "none"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One check of one kind."""

    status: Status
    error: float | None = None  # largest difference of a logit over the largest logit
    note: str = ""  # why there is nothing to check, or what failed

    @classmethod
    def bounded(cls, error: float, note: str = "") -> Cell:
        return cls("pass" if error <= BOUND else "fail", error, note)

    @classmethod
    def nothing(cls, why: str) -> Cell:
        return cls("none", None, why)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one adapter of this kind costs, as the registry says and as it was measured."""

    form: str
    memory: str  # the registry's expression, bytes for one target [m, n]
    flops: str
    bytes: int  # of the adapter that was checked, in its slot
    flops_per_token: int  # of it, by the registry
    flops_of_base: float  # the same over what the base computes for a token
    seconds_over_base: float  # CPU seconds of a decode step of 8 rows, over the base's


@dataclass(frozen=True, slots=True)
class Row:
    """One kind on one base."""

    kind: str
    base: str
    cells: Mapping[str, Cell] = field(hash=False)
    cost: Cost | None = None

    @property
    def failed(self) -> list[str]:
        return [name for name, cell in self.cells.items() if cell.status == "fail"]


def worst(cells: list[Cell]) -> Cell:
    """One cell for several bases: a failure, else the largest error."""
    failed = [cell for cell in cells if cell.status == "fail"]
    passed = [cell for cell in cells if cell.status == "pass"]
    chosen = failed or passed or cells
    return max(chosen, key=lambda cell: -1.0 if cell.error is None else cell.error)
