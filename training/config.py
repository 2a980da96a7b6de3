"""TrainConfig: what one training run is. The YAML file and the command's flags are this schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field

from training.errors import ConfigError

ALL_LINEAR = "all-linear"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Frozen):
    """JSON Lines files; see `training.data` for the two shapes of a row."""

    train: Path
    eval: Path | None = None
    max_length: int = Field(
        default=512, ge=2, description="tokens of one example, its answer included"
    )


class MethodConfig(_Frozen):
    """Which adapter is trained."""

    kind: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = Field(default=8, ge=1, le=256)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = Field(
        default=(ALL_LINEAR,),
        min_length=1,
        description="last parts of module paths, or all-linear: every quantised linear layer",
    )


class OptimConfig(_Frozen):
    """AdamW; the rate rises linearly, then falls along a cosine to a tenth."""

    learning_rate: float = Field(default=2e-3, gt=0.0)
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=16, ge=1)
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0, description="part of the steps")
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)


class TrainConfig(_Frozen):
    """One run. A run with the same config on the same machine gives the same weights."""

    base: str = Field(default="mini", description="the embedded base, a directory, or a hub id")
    data: DataConfig
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    seed: int = Field(default=0, ge=0)
    out: Path = Path("adapter")


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """The YAML file at `path`, then `overrides` ("optim.steps" -> 300), which win; None is unset.

    Raises ConfigError naming each field that is wrong, its value and what would be right.
    """
    values = _read_yaml(path) if path else {}
    for dotted, value in overrides.items():
        if value is not None:
            _put(values, dotted.split("."), value)
    try:
        return TrainConfig.model_validate(values)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a mapping is needed")
    return values


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value
