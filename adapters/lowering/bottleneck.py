"""Bottleneck adapters of AdapterHub: what they read, and how often the residual stream is added.

For a layer's output y on the stream r, the model goes on with r + y'. AdapterHub has it go on with

    f(z) + residual + (r where original_ln_after)                     one after the other
    z = y + r where original_ln_before, else y;  residual = y where residual_before_ln, else z

    f(r) + y + (r where original_ln_after)                            parallel

with f(z) = s ⊙ (U φ(D z + c) + u), so y' = y + f(z) + e r with a whole number e.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapters.checks.bottleneck import LEARNED
from adapters.delta import Bottleneck, Delta
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .factors import factor_dtype

_NORMS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


@torch.no_grad()
def lower_bottleneck(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each layer that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = {}
    take, dtype, hidden = checkpoint.take_bare, factor_dtype(base), base.spec.hidden_size
    parallel, before = config["is_parallel"], config["original_ln_before"]
    extra = int(config["original_ln_after"]) - 1
    if not parallel and before and not config["residual_before_ln"]:
        extra += 1
    reads_stream = parallel or before
    for path, start in config["tensors"].items():
        width = config["widths"][path]
        down = take(f"{start}adapter_down.0.weight", width, hidden)
        down_bias = take(f"{start}adapter_down.0.bias", width)
        scale = config["scaling"]
        if scale in LEARNED:
            scale = take(f"{start}scaling", LEARNED[scale] or hidden)
        up = (take(f"{start}adapter_up.weight", hidden, width).t() * scale).t()
        up_bias = take(f"{start}adapter_up.bias", hidden) * scale
        deltas[path] = Bottleneck(
            down.to(dtype),
            down_bias,
            up.to(dtype).contiguous(),
            up_bias,
            config["non_linearity"],
            reads_output=not parallel,
            reads_stream=reads_stream,
            extra=extra,
            stream=_norm_before(path) if reads_stream or extra else None,
        )
    return deltas


def _norm_before(path: str) -> str:
    """The norm that reads the stream before the part of a block that ends with this layer."""
    leaf = next(leaf for leaf in _NORMS if path.endswith(leaf))
    return path.removesuffix(leaf) + _NORMS[leaf]
