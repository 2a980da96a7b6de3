"""What the attention of a loaded model really does, seen from inside the attention interface."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UnservableBase

_NAME = "nibble_probe"
# What an attention function may be asked for beyond q, k, v, and is not served.
_UNSERVED = {"s_aux": "attention sinks", "position_bias": "a position bias", "alibi": "ALiBi"}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The shape that every layer's attention has."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class _Call:
    layer: int | None
    causal: bool
    query: tuple[int, ...]  # [1, heads, 1, head_dim]
    key: tuple[int, ...]  # [1, kv_heads, 1, head_dim]
    value: tuple[int, ...]
    masked: bool
    extras: tuple[str, ...]


def probe_attention(model: Any, device: torch.device) -> AttentionShape:
    """Run one token through the model and watch each layer attend.

    With a single token attention is the identity on the values, so the logits are true ones.
    Raises UnservableBase for attention that a paged KV cache of one shape cannot serve, and for
    logits that are not finite in the model's dtype.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls: list[_Call] = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        calls.append(_call(module, q, k, v, mask, more))
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    try:
        model.set_attn_implementation(_NAME)
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids, position_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[_NAME]
    if not logits.isfinite().all():
        raise UnservableBase(
            f"the base gives logits that are not finite in {logits.dtype}; try float32 or bfloat16"
        )
    return _agreed(calls, model.config.num_hidden_layers)


def _call(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, more: dict[str, Any]
) -> _Call:
    return _Call(
        layer=getattr(module, "layer_idx", None),
        causal=bool(getattr(module, "is_causal", True)) and more.get("is_causal") is not False,
        query=tuple(q.shape),
        key=tuple(k.shape),
        value=tuple(v.shape),
        masked=mask is not None,
        extras=tuple(why for name, why in _UNSERVED.items() if more.get(name) is not None),
    )


def _agreed(calls: list[_Call], num_layers: int) -> AttentionShape:
    layers = [call.layer for call in calls]
    if layers != list(range(num_layers)):
        raise UnservableBase(
            f"the layers that attend through transformers' attention interface are {layers}, "
            f"expected each of {num_layers} once, in order"
        )
    for call in calls:
        _refuse(call)
    shapes = {(call.query, call.key) for call in calls}
    if len(shapes) > 1:
        raise UnservableBase(f"layers attend with different shapes: {sorted(shapes)}")
    _, heads, _, head_dim = calls[0].query
    return AttentionShape(num_layers, heads, calls[0].key[1], head_dim)


def _refuse(call: _Call) -> None:
    where = f"the attention of layer {call.layer}"
    if not call.causal:
        raise UnservableBase(f"{where} is not causal")
    if call.masked:
        raise UnservableBase(f"{where} brings a mask of its own")
    if call.extras:
        raise UnservableBase(f"{where} needs {', '.join(call.extras)}, which is not served")
    if call.key != call.value or call.key[3] != call.query[3]:
        raise UnservableBase(
            f"{where} has queries, keys and values of {call.query[3]}, {call.key[3]} and "
            f"{call.value[3]} per head; one width is served"
        )
    if math.prod(call.key[::2]) != 1 or call.query[1] % call.key[1]:
        raise UnservableBase(f"{where} sees queries {call.query} and keys {call.key} for one token")
