"""The keys and values of virtual tokens: their embeddings, run through the base once.

The engine may be computing meanwhile with the very same weights, so this run has a model of its
own around them.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LoweredAdapter, Prefix
from adapters.operator import Segments, install
from base import attention_functions
from base.architecture import another
from base.kernels import paged_attention
from base.load import Base

_NAME = "nibble_virtual_tokens"
_place = threading.local()


@torch.no_grad()
def run_virtual_tokens(embeddings: Tensor, base: Base, deltas: Mapping[str, Delta]) -> Prefix:
    """Keys and values of tokens whose input embeddings are `embeddings` [n, hidden], in base.dtype.

    They stand at positions 0 to n - 1 and see one another causally, as PEFT's forward pass has it;
    `deltas` are the adapter's own layers (modules_to_save).
    """
    n, model = embeddings.shape[0], _twin(base)
    if deltas:
        own = LoweredAdapter("", "", "unmerged", deltas)
        install(model, base.spec).segments = Segments.of([(n, own)])
    attention_functions.choose(model, _NAME)
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    _place.layers = layers
    try:
        model.base_model(
            inputs_embeds=embeddings.to(base.dtype)[None],
            position_ids=torch.arange(n, device=embeddings.device)[None],
            use_cache=False,
        )
    finally:
        _place.layers = None
    found = [layers[i] for i in range(base.spec.num_layers)]
    return Prefix(torch.stack([k for k, _ in found]), torch.stack([v for _, v in found]))


def _twin(base: Base) -> Any:
    """transformers' own model of the base's class, over the layers that were loaded.

    Built afresh, not copied: an engine has put its own modules into `base.model`, and their state
    is that of its running step.
    """
    spec, loaded = base.spec, base.model
    with torch.device("meta"):  # of this thread alone, as no default dtype would be
        model = another(loaded).eval()
    for path in spec.linears:
        model.set_submodule(path, base.linear(path))
    for path in spec.embeddings:
        model.set_submodule(path, base.embedding(path))
    for path in spec.norms:
        model.get_submodule(path)._parameters.update(base.norm(path)._parameters)
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # What a checkpoint does not hold: rotary frequencies.
            model.set_submodule(path, copy.deepcopy(loaded.get_submodule(path)))
    rest = [
        name
        for name, t in itertools.chain(model.named_parameters(), model.named_buffers())
        if t.is_meta
    ]
    if rest:
        raise RuntimeError(f"{rest[0]} of {spec.architecture} was not loaded")
    return model


def _attend(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, n, width]
    key: Tensor,  # [1, kv_heads, n, width]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Keep K and V of the layer, and attend over them as the engine does: [1, n, heads, width]."""
    keys, values = (t[0].transpose(0, 1).contiguous() for t in (key, value))
    _place.layers[module.layer_idx] = (keys, values)
    n, where = keys.shape[0], query.device
    out = paged_attention(
        query[0].transpose(0, 1),
        keys[:, None],  # pages of one token
        values[:, None],
        torch.arange(n, dtype=torch.int32, device=where)[None],
        torch.tensor([0, n], dtype=torch.int32, device=where),
        torch.tensor([n], dtype=torch.int32, device=where),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out.unsqueeze(0), None


# Nothing else masks: `_attend` is causal.
attention_functions.register(_NAME, _attend)
