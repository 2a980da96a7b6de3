"""LoRA and its variants: rsLoRA, DoRA, patterns, biases, embeddings, modules_to_save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import (
    Delta,
    EmbeddingDelta,
    LinearDelta,
    LowRank,
    PrivateEmbedding,
    PrivateLinear,
    PrivateNorm,
)
from adapters.errors import InvalidAdapter
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .dora import column_norms, weight_norms


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
        deltas[path] = lora.saved(path)
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
        self.take = checkpoint.take
        self.has = checkpoint.has
        self.base = base
        # The kernels read factors in float32 and bfloat16.
        self.dtype = base.dtype if base.dtype == torch.bfloat16 else torch.float32

    def linear(self, path: str) -> LinearDelta:
        shape, rank = self.base.spec.linears[path], self._rank(path)
        self._check_base_copy(path, self.base.linear(path).weight)
        A = self.take(f"{path}.lora_A.weight", rank, shape.in_features)
        B = self.take(f"{path}.lora_B.weight", shape.out_features, rank).mul_(self._scale(path))
        g = None
        if self.config["use_dora"]:
            g = self._gain(path, weight_norms(self.base.linear(path), A, B))
        return LinearDelta((self._low_rank(A, B),), g=g, bias=self._bias(path))

    def embedding(self, path: str) -> EmbeddingDelta:
        shape, rank = self.base.spec.embeddings[path], self._rank(path)
        table = self.base.embedding(path).weight.detach()
        self._check_base_copy(path, table)
        A = self.take(f"{path}.lora_embedding_A", rank, shape.rows)
        B = self.take(f"{path}.lora_embedding_B", shape.width, rank).mul_(self._scale(path))
        g = self._gain(path, column_norms(table, A, B)) if self.config["use_dora"] else None
        low_rank = self._low_rank(A, B)
        return EmbeddingDelta(_by_columns(low_rank.A), low_rank.B, g)

    def saved(self, path: str) -> PrivateLinear | PrivateEmbedding | PrivateNorm:
        """A module of modules_to_save, trained whole."""
        spec, name, dtype = self.base.spec, f"{path}.weight", self.base.dtype
        if path in spec.norms:
            return PrivateNorm(self.take(name, spec.norms[path]).to(dtype))
        if path in spec.embeddings:
            table = spec.embeddings[path]
            return PrivateEmbedding(self.take(name, table.rows, table.width).to(dtype))
        linear = spec.linears[path]
        weight = self.take(name, linear.out_features, linear.in_features).to(dtype)
        bias = self.take(f"{path}.bias", linear.out_features) if linear.bias else None
        return PrivateLinear(weight, bias)

    def _rank(self, path: str) -> int:
        return int(self.config["rank_pattern"].get(path, self.config["r"]))

    def _scale(self, path: str) -> float:
        rank = self._rank(path)
        alpha = float(self.config["alpha_pattern"].get(path, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)

    def _low_rank(self, A: Tensor, B: Tensor) -> LowRank:
        return LowRank(A.to(self.dtype), _by_columns(B.to(self.dtype)))

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

    def _check_base_copy(self, path: str, own: Any) -> None:
        """PEFT saves the base's own table beside an adapter on it: it must be this base's."""
        name = f"{path}.base_layer.weight"
        if not self.has(name) or not isinstance(own, Tensor):
            return  # a copy of a quantised weight stays, and is refused as left over
        copy = self.take(name, *own.shape)
        # Training and serving in half precision may each have rounded it once.
        if not torch.allclose(copy, own.detach().float(), rtol=2**-7, atol=1e-6):
            raise InvalidAdapter(
                "differs from the base's own: a table that was resized or trained as well "
                "belongs in modules_to_save",
                name,
            )


def _by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, in its own memory: what the kernels stream."""
    return matrix.t().contiguous().t()
