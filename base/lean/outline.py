"""What transformers made of a config.json, noted: enough to build the model again without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from base.fused import family_of
from base.lean.model import LeanModel, Outline

# What our code reads of a configuration, as transformers resolved it.
_CONFIG = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "layer_types",
    "sliding_window",
    "hidden_activation",
    "hidden_act",
    "final_logit_softcapping",
    "rope_parameters",
    "max_position_embeddings",
    "eos_token_id",
)
_ATTENTION = (
    "layer_idx",
    "head_dim",
    "num_key_value_groups",
    "scaling",
    "is_causal",
    "sliding_window",
    "attn_logit_softcapping",
)
_FIXED_ROPES = frozenset({"default", "linear", "llama3", "yarn"})  # the same at every length


def outline_of(model: Any, config_json: Mapping[str, Any]) -> Outline | None:
    """The outline of an empty model of transformers; None where a lean one would not be the same:
    another family, another dtype than float32, parts that are not known here.
    """
    family = family_of(model)
    if family is None or any(p.dtype is not torch.float32 for p in model.parameters()):
        return None
    rotary = _rotary(model.model.rotary_emb, model.config, family.rotary_by_type)
    if rotary is None:
        return None
    modules = dict(model.named_modules())
    outline = {
        "family": family.name,
        "config": {name: getattr(model.config, name) for name in _held(model.config, _CONFIG)},
        "config_json": config_json,
        "embedding": _table(model.get_input_embeddings()),
        "attention": [
            {name: getattr(layer.self_attn, name) for name in _held(layer.self_attn, _ATTENTION)}
            for layer in model.model.layers
        ],
        "rotary": rotary,
        "norms": {p: _norm(m) for p, m in modules.items() if family.is_norm(m)},
        "linears": {
            p: [m.out_features, m.in_features, m.bias is not None]
            for p, m in modules.items()
            if isinstance(m, nn.Linear)
        },
    }
    try:
        noted: Outline = json.loads(json.dumps(outline))
    except (TypeError, ValueError):  # a value that is no JSON: a class that we do not know
        return None
    return noted if _places(LeanModel(noted)) == _places(model) else None


def _held(module: Any, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if hasattr(module, name)]


def _table(embedding: Any) -> dict[str, Any]:
    scale = getattr(embedding, "embed_scale", None)
    return {
        "rows": embedding.num_embeddings,
        "width": embedding.embedding_dim,
        "padding_idx": embedding.padding_idx,
        "scale": None if scale is None else float(scale),
    }


def _norm(norm: Any) -> list[Any]:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return [norm.weight.numel(), float(eps)]


def _rotary(rotary: Any, config: Any, by_type: bool) -> dict[str, Any] | None:
    """Frequencies and scaling by layer type, "" where all have the same; None for other ropes."""
    kinds = sorted(set(config.layer_types)) if by_type else [""]
    found: dict[str, Any] = {}
    for kind in kinds:
        rope = config.rope_parameters[kind] if by_type else config.rope_parameters
        prefix = f"{kind}_" if kind else ""
        if (rope or {}).get("rope_type") not in _FIXED_ROPES:
            return None
        found[kind] = {
            "inv_freq": getattr(rotary, f"{prefix}inv_freq").float().tolist(),
            "scaling": float(getattr(rotary, f"{prefix}attention_scaling")),
        }
    return found


def _places(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
