"""What every method gives: an adapter that stands on the base while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from base.load import Base
from training.config import TrainConfig


class Attached(Protocol):
    """One adapter, attached to a base. The base's own weights have no gradient."""

    @property
    def virtual_tokens(self) -> int:
        """How many positions before the prompt belong to the adapter."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, fp32."""

    def groups(self, b_rate_ratio: float) -> list[dict[str, Any]]:
        """The same as AdamW's parameter groups; "ratio" multiplies a group's rate (LoRA+)."""

    def train(self, on: bool) -> None:
        """Switch the adapter's dropout; the frozen base always runs as it is served."""

    def forward(self, **inputs: Any) -> Any:
        """The model with the adapter: inputs and output as transformers has them."""

    def logits(self, tokens: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
        """[B, len(columns), vocabulary] at `columns` of tokens [B, L], mask [B, L]."""

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss."""

    def after_update(self, step: int) -> None:
        """Hears that step `step`, from 1, updated the weights; the gradients are still there."""

    def state(self) -> dict[str, Any]:
        """All that training has changed, beyond the parameters too: what `restore` takes."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, bit for bit."""

    def save(self, out: Path) -> None:
        """Write PEFT's two files to the directory `out`, which is made."""

    def detach(self) -> None:
        """Set the base's own layers back."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row: `attach` puts a fresh adapter of a run's `method` on the base."""

    name: str
    attach: Callable[[Base, TrainConfig], Attached]
    makes_base: bool = False  # from a float base (`base.load.load_float`), and saves another one
    through_cache: bool = False  # its keys and values come in a cache: no layer can run twice
