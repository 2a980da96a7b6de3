"""A run's config for tests that read no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.config import TrainConfig


def run_of(
    kind: str = "lora", *, optim: dict[str, Any] | None = None, **method: Any
) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "data": {"train": Path("none")},
            "method": {"kind": kind, **method},
            "optim": {"learning_rate": 1e-2, "steps": 150, "batch_size": 6, **(optim or {})},
        }
    )
