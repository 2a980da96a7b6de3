"""What a base model is, without its tensors: names, shapes and identity. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer: weight [out_features, in_features], and whether it has a bias [out]."""

    out_features: int
    in_features: int
    bias: bool = False
    quantized: bool = True


@dataclass(frozen=True, slots=True)
class EmbeddingShape:
    """One embedding table: [rows, width]."""

    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The shape and identity of one base.

    Keys of `linears` and `embeddings` are module paths as transformers names them, for example
    `model.layers.0.self_attn.q_proj`, `lm_head`, `model.embed_tokens`.
    """

    id: str
    revision: str
    architecture: str  # transformers' model_type
    fingerprint: str  # sha-256, hex: configuration and float weights before quantisation
    linears: Mapping[str, LinearShape]
    embeddings: Mapping[str, EmbeddingShape]
    norms: Mapping[str, int]  # module path -> width of the norm's weight
    tied_embeddings: bool
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    double_quant: bool = False
    twin: str = ""  # its fingerprint with the scales otherwise; "" where the checkpoint is NF4
