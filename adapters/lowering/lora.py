"""LoRA and its variants: rsLoRA, DoRA, patterns, biases, embeddings, modules_to_save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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

from .checkpoint import AdapterCheckpoint, required
from .dora import column_norms, weight_norms
from .patterns import pattern_value

_LEAVES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector.weight",  # as PEFT keeps it, and some tools save it
    "lora_magnitude_vector",
    "base_layer.weight",
    "base_layer.bias",
    "weight",
    "bias",
)

# Fields of LoraConfig (peft 0.21) that must be unset, and why. An unknown field is the
# validator's to refuse; these would change what is computed here.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA switches on in the middle of a prompt",
    "arrow_config": "Arrow routes by token",
    "kasa_config": "KaSA changes the base's own weights",
    "layer_replication": "it changes the base's layers",
    "megatron_config": "Megatron layers are not transformers' layers",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "parameters of expert layers are not served",
    "trainable_token_indices": "trainable tokens are not served yet",
    "use_bdlora": "block-diagonal factors are not served",
    "use_qalora": "QALoRA pools its input",
    "velora_config": "VeLoRA is not served",
}

# Other initialisations split the base's own weights, and the adapter means the rest of the split.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The fields of an adapter_config that say what its tensors mean."""

    r: int
    alpha: float
    rslora: bool
    dora: bool
    lora_bias: bool
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    saved: tuple[str, ...]  # modules_to_save

    @classmethod
    def read(cls, config: Mapping[str, Any], tied_embeddings: bool) -> LoraSettings:
        """From a LoraConfig as PEFT saves it; raises InvalidAdapter, naming the field."""
        for field, reason in _REFUSED.items():
            if config.get(field):
                raise InvalidAdapter(f"must be unset: {reason}", field)
        if config.get("ensure_weight_tying") and tied_embeddings:
            raise InvalidAdapter(
                "must be false: adapters that are tied with the embeddings are not served",
                "ensure_weight_tying",
            )
        if config.get("init_lora_weights", True) not in _INITIALISATIONS:
            raise InvalidAdapter(
                f"{config['init_lora_weights']!r} changes the base's weights: save the adapter "
                "with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
                "init_lora_weights",
            )
        settings = cls(
            r=config["r"],
            alpha=config["lora_alpha"],
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            lora_bias=bool(config.get("lora_bias")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            saved=tuple(config.get("modules_to_save") or ()),
        )
        if settings.dora and settings.lora_bias:
            raise InvalidAdapter(
                "must be false with use_dora: PEFT defines no such pair", "lora_bias"
            )
        return settings

    def rank(self, path: str) -> int:
        return int(pattern_value(self.rank_pattern, path, self.r, "rank_pattern"))

    def scale(self, path: str) -> float:
        rank = self.rank(path)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha, "alpha_pattern")
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def saves(self, path: str) -> bool:
        """Is this module, or one that contains it, listed in modules_to_save?"""
        steps = path.split(".")
        above = [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
        return any(module.endswith(name) for module in above for name in self.saved)


def lower_lora(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the file has tensors for. Raises InvalidAdapter."""
    settings = LoraSettings.read(config, base.spec.tied_embeddings)
    lowering = _LoraLowering(settings, checkpoint, base)
    modules = checkpoint.modules(_LEAVES)
    return {path: lowering.delta(path, parts) for path, parts in modules.items()}


class _LoraLowering:
    """One file against one base."""

    def __init__(self, settings: LoraSettings, checkpoint: AdapterCheckpoint, base: Base) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.base = base
        # The kernels read float32 and bfloat16 factors.
        self.dtype = base.dtype if base.dtype == torch.bfloat16 else torch.float32

    def delta(self, path: str, parts: Mapping[str, str]) -> Delta:
        spec = self.base.spec
        if path in spec.linears:
            return (
                self._saved_linear(path, parts) if "weight" in parts else self._linear(path, parts)
            )
        if path in spec.embeddings:
            saved = "weight" in parts
            return self._saved_embedding(path, parts) if saved else self._embedding(path, parts)
        if path in spec.norms and "weight" in parts:
            return self._saved_norm(path, parts)
        raise InvalidAdapter(
            "the base has no module at this path that could take it", min(parts.values())
        )

    # --- linears

    def _linear(self, path: str, parts: Mapping[str, str]) -> LinearDelta:
        self._base_layer_is_unchanged(path, parts)
        bias = self._bias(path, parts)
        if bias is not None and not any(leaf.startswith("lora_") for leaf in parts):
            return LinearDelta(bias=bias)
        A, B = self._factors(path, parts)
        g = None
        if self._magnitude(path, parts):
            g = self._gain(path, parts, weight_norms(self.base.linear(path), A, B))
        return LinearDelta((self._low_rank(A, B),), g=g, bias=bias)

    def _factors(self, path: str, parts: Mapping[str, str]) -> tuple[Tensor, Tensor]:
        shape, rank = self.base.spec.linears[path], self.settings.rank(path)
        A = self._take(parts, "lora_A.weight", path, (rank, shape.in_features))
        B = self._take(parts, "lora_B.weight", path, (shape.out_features, rank))
        return A, B.mul_(self.settings.scale(path))

    def _bias(self, path: str, parts: Mapping[str, str]) -> Tensor | None:
        """b_eff [out]: the file's bias in place of the base's, plus lora_bias with its scale."""
        width = (self.base.spec.linears[path].out_features,)
        bias = None
        for leaf in ("base_layer.bias", "bias"):
            if leaf in parts:
                if not self.base.spec.linears[path].bias:
                    raise InvalidAdapter("the base has no bias here", parts[leaf])
                bias = self._take(parts, leaf, path, width)
        if "lora_B.bias" not in parts:
            return bias
        if not self.settings.lora_bias:
            raise InvalidAdapter("needs lora_bias in the config", parts["lora_B.bias"])
        added = self._take(parts, "lora_B.bias", path, width).mul_(self.settings.scale(path))
        own = self.base.linear(path).bias
        if bias is None and own is not None:
            bias = own.detach().float()
        return added if bias is None else bias + added

    def _saved_linear(self, path: str, parts: Mapping[str, str]) -> PrivateLinear:
        self._is_saved(path, parts)
        shape = self.base.spec.linears[path]
        weight = self._take(parts, "weight", path, (shape.out_features, shape.in_features))
        bias = self._take(parts, "bias", path, (shape.out_features,)) if shape.bias else None
        return PrivateLinear(weight.to(self.base.dtype), bias)

    # --- embeddings and norms

    def _embedding(self, path: str, parts: Mapping[str, str]) -> EmbeddingDelta:
        self._base_layer_is_unchanged(path, parts)
        shape, rank = self.base.spec.embeddings[path], self.settings.rank(path)
        A = self._take(parts, "lora_embedding_A", path, (rank, shape.rows))
        B = self._take(parts, "lora_embedding_B", path, (shape.width, rank))
        B.mul_(self.settings.scale(path))
        g = None
        if self._magnitude(path, parts):
            # One norm for each column of the table, over the vocabulary: PEFT's DoraEmbeddingLayer.
            table = self.base.embedding(path).weight.detach()
            g = self._gain(path, parts, column_norms(table, A, B))
        low_rank = self._low_rank(A, B)
        return EmbeddingDelta(_by_columns(low_rank.A), low_rank.B, g)

    def _saved_embedding(self, path: str, parts: Mapping[str, str]) -> PrivateEmbedding:
        self._is_saved(path, parts)
        shape = self.base.spec.embeddings[path]
        weight = self._take(parts, "weight", path, (shape.rows, shape.width))
        return PrivateEmbedding(weight.to(self.base.dtype))

    def _saved_norm(self, path: str, parts: Mapping[str, str]) -> PrivateNorm:
        self._is_saved(path, parts)
        weight = self._take(parts, "weight", path, (self.base.spec.norms[path],))
        return PrivateNorm(weight.to(self.base.dtype))

    # --- shared

    def _take(
        self, parts: Mapping[str, str], leaf: str, path: str, shape: tuple[int, ...]
    ) -> Tensor:
        return self.checkpoint.take(required(parts, leaf, path), shape)

    def _low_rank(self, A: Tensor, B: Tensor) -> LowRank:
        return LowRank(A.to(self.dtype), _by_columns(B.to(self.dtype)))

    def _magnitudes(self, parts: Mapping[str, str]) -> list[str]:
        return [leaf for leaf in parts if leaf.startswith("lora_magnitude_vector")]

    def _magnitude(self, path: str, parts: Mapping[str, str]) -> str | None:
        """The name of DoRA's magnitude vector; it must be there exactly when use_dora says so."""
        found = self._magnitudes(parts)
        if self.settings.dora and not found:
            raise InvalidAdapter("use_dora needs this tensor", f"{path}.lora_magnitude_vector")
        if found and not self.settings.dora:
            raise InvalidAdapter("needs use_dora in the config", parts[found[0]])
        return found[0] if found else None

    def _gain(self, path: str, parts: Mapping[str, str], norms: Tensor) -> Tensor:
        """g = m / ‖W + B A‖."""
        leaf = self._magnitudes(parts)[0]
        magnitude = self._take(parts, leaf, path, tuple(norms.shape))
        if not bool((norms > 0).all()):
            raise InvalidAdapter("a row of W + BA is zero, so DoRA has no norm there", parts[leaf])
        return magnitude / norms

    def _is_saved(self, path: str, parts: Mapping[str, str]) -> None:
        if not self.settings.saves(path):
            raise InvalidAdapter("needs its module in modules_to_save", parts["weight"])

    def _base_layer_is_unchanged(self, path: str, parts: Mapping[str, str]) -> None:
        """PEFT saves the base's own table beside an adapter on it; ours must be the same one."""
        if "base_layer.weight" not in parts:
            return
        tables = self.base.spec.embeddings
        layer = self.base.embedding(path) if path in tables else self.base.linear(path)
        if not isinstance(layer.weight, Tensor):
            raise InvalidAdapter(
                "replaces a quantised weight of the base", parts["base_layer.weight"]
            )
        own = layer.weight.detach().float()
        saved = self._take(parts, "base_layer.weight", path, tuple(own.shape))
        # Half-precision training and serving may each have rounded it once.
        if not torch.allclose(saved, own, rtol=2**-7, atol=1e-7):
            raise InvalidAdapter(
                "differs from the base's: resized or retrained tables belong in modules_to_save",
                parts["base_layer.weight"],
            )


def _by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, in its own memory: what the kernels stream."""
    return matrix.t().contiguous().t()
