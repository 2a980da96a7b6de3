"""The embedding table and the output head in the checkpoint's own dtype, computed with in float32.

On a CPU that computes in float32, weights that were saved in bfloat16 stay so: half the memory, and
half the bytes that the head's product reads. No digit is lost, since float32 holds each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from base.kernels import dense_linear


class StoredEmbedding(nn.Embedding):
    """Rows of a table in its own dtype, looked up as float32, times Gemma's scale if it has one."""

    embed_scale: Tensor | None

    def forward(self, ids: Tensor) -> Tensor:
        rows = functional.embedding(ids, self.weight, self.padding_idx).float()
        return rows if self.embed_scale is None else rows * self.embed_scale


class StoredLinear(nn.Linear):
    """y = x Wᵀ + b with W in its own dtype: x [..., in] -> y [..., out] in x's."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return functional.linear(x, self.weight.to(x.dtype), self.bias)
        return dense_linear(x, self.weight, self.bias)


def keeps_dtype(model: Any, module: nn.Module) -> bool:
    """Can this module of a loaded model keep a weight in another dtype than the model's?"""
    if module is model.get_output_embeddings():
        return type(module) is nn.Linear
    if module is not model.get_input_embeddings():
        return False
    if not isinstance(model.get_output_embeddings(), nn.Linear):  # which may share the weight
        return False
    scaled = type(module).__name__.endswith("TextScaledWordEmbedding")
    return type(module) is nn.Embedding or scaled


def swap_stored(model: Any) -> None:
    """Put the modules above in the place of those whose weight has another dtype than float32."""
    for path, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype is torch.float32 or not keeps_dtype(model, module):
            continue
        rows, width = weight.shape
        own: StoredEmbedding | StoredLinear
        with torch.device("meta"):
            if isinstance(module, nn.Embedding):
                own = StoredEmbedding(rows, width, padding_idx=module.padding_idx)
                own.embed_scale = getattr(module, "embed_scale", None)
            else:
                own = StoredLinear(width, rows, bias=False)
                own.bias = module._parameters["bias"]
        own.weight = weight
        model.set_submodule(path, own.train(module.training))
