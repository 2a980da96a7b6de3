"""The modules of a decoder as an outline tells them: places for tensors, under transformers' paths.

Each module says by `kind` which class of transformers it stands for. Nothing here computes but the
angles: `base.fused` swaps norms, attention, MLP and layers for its own, and runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from base.dense import StoredEmbedding, empty_linear, empty_table

Outline = Mapping[str, Any]  # as `base.lean.outline` writes it: JSON


class LeanModule(nn.Module):
    """A module that only holds others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


class LeanAttention(LeanModule):
    """The numbers of one layer's attention, as attributes of transformers' names."""

    def __init__(self, kind: str, config: Any, numbers: Mapping[str, Any]) -> None:
        super().__init__(kind)
        self.config = config
        for name, value in numbers.items():
            setattr(self, name, value)


class LeanNorm(nn.Module):
    """The weight [width] and eps of a norm."""

    def __init__(self, kind: str, width: int, eps: float) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)


class LeanRotary(nn.Module):
    """transformers' angles from noted frequencies: one set, or one for each layer type."""

    def __init__(self, sets: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._scaling: dict[str, float] = {}
        for kind, one in sets.items():
            self._scaling[kind] = one["scaling"]
            frequencies = torch.tensor(one["inv_freq"], dtype=torch.float32)
            self.register_buffer(f"{kind}_inv_freq", frequencies, persistent=False)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """position_ids [1, T] -> cos, sin [1, T, dim] in the dtype of x."""
        kind = layer_type or ""
        frequencies = self.get_buffer(f"{kind}_inv_freq").to(x.device)
        turned = position_ids[..., None].float() * frequencies
        angles = torch.cat((turned, turned), dim=-1)
        scaling = self._scaling[kind]
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


class LeanModel(nn.Module):
    """A causal LM whose parameters are on the meta device; the interface is transformers' own."""

    def __init__(self, outline: Outline) -> None:
        super().__init__()
        family = str(outline["family"])
        self.kind = f"{family}ForCausalLM"
        self.config = SimpleNamespace(**outline["config"], _attn_implementation=None)
        self.config_json: Mapping[str, Any] = outline["config_json"]
        self.model = LeanModule(f"{family}Model")
        self.model.embed_tokens = _table(**outline["embedding"])
        self.model.layers = nn.ModuleList(
            _layer(family, self.config, numbers) for numbers in outline["attention"]
        )
        self.model.rotary_emb = LeanRotary(outline["rotary"])
        for path, (width, eps) in outline["norms"].items():
            self._put(path, LeanNorm(f"{family}RMSNorm", width, eps))
        for path, (out, inner, bias) in outline["linears"].items():
            self._put(path, empty_linear(nn.Linear, out, inner, bias))
        self.eval().requires_grad_(False)

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self.get_submodule(parent).add_module(name, module)

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def set_attn_implementation(self, name: str) -> None:
        """Only names of `base.attention_functions` are known here."""
        self.config._attn_implementation = name

    def tie_weights(self, missing_keys: set[str], recompute_mapping: bool = False) -> None:
        """Give the head the table's weight where it is missing, and take it off what is missing."""
        if "lm_head.weight" in missing_keys:
            self.get_output_embeddings().weight = self.get_input_embeddings().weight
            missing_keys.discard("lm_head.weight")


def _layer(family: str, config: Any, numbers: Mapping[str, Any]) -> LeanModule:
    layer = LeanModule(f"{family}DecoderLayer")
    layer.self_attn = LeanAttention(f"{family}Attention", config, numbers)
    layer.mlp = LeanModule(f"{family}MLP")
    return layer


def _table(rows: int, width: int, padding_idx: int | None, scale: float | None) -> nn.Embedding:
    if scale is None:
        return empty_table(nn.Embedding, rows, width, padding_idx)
    table = empty_table(StoredEmbedding, rows, width, padding_idx)
    table.embed_scale = torch.tensor(scale)
    return table
