"""LoRA and its variants: rsLoRA, DoRA, patterns, biases, embeddings, tokens, modules_to_save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapters.delta import Delta, EmbeddingDelta, LinearDelta
from adapters.errors import InvalidAdapter
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dora import column_norms, weight_norms
from .factors import by_columns, low_rank
from .token_rows import lower_token_rows
from .whole import lower_whole


def lower_lora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter.

    Canonical means that validation has resolved every pattern: targets, saved modules and the keys
    of rank_pattern and alpha_pattern are module paths of this base.
    """
    lora = _Lora(config, checkpoint, base)
    spec = base.spec
    deltas: dict[str, Delta] = {}
    for path in config["target_modules"]:
        deltas[path] = lora.embedding(path) if path in spec.embeddings else lora.linear(path)
    for path in config["modules_to_save"] or ():
        deltas[path] = lower_whole(path, checkpoint, base)
    rows = config.get("trainable_token_indices") or {}
    deltas |= lower_token_rows(rows, checkpoint, base, "token_adapter.")
    if config["bias"] == "all":
        for path, shape in spec.linears.items():
            if shape.bias and path not in deltas:
                deltas[path] = LinearDelta(bias=checkpoint.take(f"{path}.bias", shape.out_features))
    return deltas


class _Lora:
    """One file against one base."""

    def __init__(
        self, config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.take = checkpoint.take
        self.has = checkpoint.has
        self.base = base

    def linear(self, path: str) -> LinearDelta:
        shape, rank = self.base.spec.linears[path], self._rank(path)
        self.checkpoint.take_base_copy(path, self.base.linear(path).weight)
        A = self.take(f"{path}.lora_A.weight", rank, shape.in_features)
        B = self.take(f"{path}.lora_B.weight", shape.out_features, rank).mul_(self._scale(path))
        g = None
        if self.config["use_dora"]:
            g = self._gain(path, weight_norms(self.base.linear(path), A, B))
        return LinearDelta((low_rank(A, B, self.base),), g=g, bias=self._bias(path))

    def embedding(self, path: str) -> EmbeddingDelta:
        shape, rank = self.base.spec.embeddings[path], self._rank(path)
        table = self.base.embedding(path).weight
        self.checkpoint.take_base_copy(path, table)
        A = self.take(f"{path}.lora_embedding_A", rank, shape.rows)
        B = self.take(f"{path}.lora_embedding_B", shape.width, rank).mul_(self._scale(path))
        g = self._gain(path, column_norms(table, A, B)) if self.config["use_dora"] else None
        A, B = low_rank(A, B, self.base).matrices()
        return EmbeddingDelta(by_columns(A), B, g)

    def _rank(self, path: str) -> int:
        return int(self.config["rank_pattern"].get(path, self.config["r"]))

    def _scale(self, path: str) -> float:
        rank = self._rank(path)
        alpha = float(self.config["alpha_pattern"].get(path, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)

    def _gain(self, path: str, norms: Tensor) -> Tensor:
        """g = m / ‖W + B A‖."""
        name = f"{path}.lora_magnitude_vector"
        if self.has(f"{name}.weight"):  # as PEFT holds it, and some versions wrote it
            name = f"{name}.weight"
        magnitude = self.take(name, norms.numel())
        if not bool((norms > 0).all()):
            raise InvalidAdapter("W + BA has a row of zeros, where DoRA has no direction", name)
        return magnitude / norms

    def _bias(self, path: str) -> Tensor | None:
        """b_eff [out]: the file's bias in place of the base's, plus lora_bias with its scale."""
        shape, own = self.base.spec.linears[path], self.base.linear(path).bias
        bias = None
        if shape.bias and self.config["bias"] in ("all", "lora_only"):
            bias = self.take(f"{path}.base_layer.bias", shape.out_features)
        if not self.config["lora_bias"]:
            return bias
        added = self.take(f"{path}.lora_B.bias", shape.out_features).mul_(self._scale(path))
        if bias is None and own is not None:
            bias = own.detach().float()
        return added if bias is None else bias + added
