"""What most methods share: the base's own model runs, with whatever was put into it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from base.load import Base
from training.errors import MethodError


class AttachedModel(ABC):
    """`training.methods.method.Attached` for parts that stand in `base.model` itself.

    One group of parameters, no penalty, no dropout, and no state but the parameters; a method that
    has more says so.
    """

    virtual_tokens = 0
    base: Base

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, fp32."""

    def groups(self, b_rate_ratio: float) -> list[dict[str, Any]]:
        if b_rate_ratio != 1.0:
            raise MethodError(
                f"optim.b_rate_ratio is {b_rate_ratio}: only LoRA, rsLoRA and DoRA have a B"
            )
        return [{"params": self.parameters(), "ratio": 1.0}]

    def train(self, on: bool) -> None:
        del on

    def forward(self, **inputs: Any) -> Any:
        return self.base.model(**inputs)

    def logits(self, tokens: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
        """[B, len(columns), vocabulary] at `columns` of tokens [B, L], mask [B, L]."""
        output = self.forward(
            input_ids=tokens, attention_mask=mask, logits_to_keep=columns, use_cache=False
        )
        logits: Tensor = output.logits
        return logits

    def penalty(self) -> Tensor | None:
        return None

    def after_update(self, step: int) -> None:
        del step

    def state(self) -> dict[str, Any]:
        return {"parameters": [p.detach().clone() for p in self.parameters()]}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for parameter, kept in zip(self.parameters(), state["parameters"], strict=True):
            parameter.copy_(kept)
