"""Where a study keeps what it made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """The study's folder on the disk."""

    root: Path

    def material(self, task: str) -> Path:
        return self.root / "material" / task

    @property
    def retention(self) -> Path:
        return self.root / "material" / "retention.jsonl"

    def result(self, arm: str) -> Path:
        return self.root / "arms" / f"{arm}.json"

    def adapter(self, task: str, name: str, learning_rate: float, seed: int) -> Path:
        return self.root / "adapters" / f"{task}.{name}.lr{learning_rate:g}.s{seed}"
