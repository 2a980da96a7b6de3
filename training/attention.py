"""Attention of a training step on a CPU: each document of each row by itself.

transformers would build a mask of all pairs of a row, compute what it forbids, and repeat keys and
values for every query head. Here a document's keys are as many as its own tokens, and heads that
share keys read them where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from base import attention_functions

NAME = "nibble_documents"
# Classes of transformers that hand over q and k turned by their positions, and those positions.
KNOWN = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Document = tuple[int, int, int]  # row, first token, the one after the last


def documents(positions: Tensor, rows: int) -> list[Document]:
    """Where each begins and ends: positions [rows or 1, L] start again at 0 with each of them."""
    found = []
    for row in range(rows):
        own = positions[row if len(positions) > 1 else 0]
        starts = sorted({0, *(own == 0).nonzero().flatten().tolist()})
        stops = [*starts[1:], len(own)]
        found += [(row, start, stop) for start, stop in zip(starts, stops, strict=True)]
    return found


class _Attention(torch.autograd.Function):
    """softmax(scale q kᵀ) v within each document, no token seeing a later one.

    q [B, H, L, D], k and v [B, K, L, D] where H / K heads share one of k -> [B, L, H, D].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, found: list[Document]
    ) -> Tensor:
        rows, heads, length, width = q.shape
        y = q.new_empty(rows, length, heads, width)
        sums = []
        for document in found:
            out, lse = _flash(*_of(document, q, k, v), 0.0, True, scale=scale)
            _placed(y, document, k.shape[1]).copy_(out)
            sums.append(lse)
        ctx.save_for_backward(q, k, v, y, *sums)
        ctx.scale, ctx.found = scale, found
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *sums = ctx.saved_tensors
        shared = k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for document, lse in zip(ctx.found, sums, strict=True):
            row, start, stop = document
            dq, dk, dv = _flash_backward(
                _placed(grads[0], document, shared),
                *_of(document, q, k, v),
                _placed(y, document, shared),
                lse,
                0.0,
                True,
                scale=ctx.scale,
            )
            _shared(grad_q[row, :, start:stop], shared).copy_(dq)
            torch.sum(dk, dim=1, out=grad_k[row, :, start:stop])
            torch.sum(dv, dim=1, out=grad_v[row, :, start:stop])
        return grad_q, grad_k, grad_v, None, None


def _of(document: Document, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One document's q, k and v as [K, H / K, l, D]: heads that share keys are a batch of their
    own, and the keys are repeated by a stride of 0."""
    row, start, stop = document
    own = _shared(q[row, :, start:stop], k.shape[1])
    keys, values = (
        t[row, :, start:stop].unsqueeze(1).expand(-1, own.shape[1], -1, -1) for t in (k, v)
    )
    return own, keys, values


def _placed(y: Tensor, document: Document, shared: int) -> Tensor:
    """One document of y [B, L, H, D] as [K, H / K, l, D], without a copy."""
    row, start, stop = document
    return _shared(y[row, start:stop].transpose(0, 1), shared)


def _shared(t: Tensor, shared: int) -> Tensor:
    """[H, l, D] -> [K, H / K, l, D], without a copy."""
    heads, length, width = t.shape
    return t.view(shared, heads // shared, length, width)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_ids: Tensor,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' signature; there is no mask, for positions say all that it would."""
    assert attention_mask is None, "only where nothing else is masked (`by_document`)"
    assert sliding_window is None or query.shape[2] <= sliding_window
    found = documents(position_ids, len(query))
    y: Tensor = _Attention.apply(query, key, value, scaling, found)  # type: ignore[no-untyped-call]
    return y, None


attention_functions.register(NAME, attend)


@contextmanager
def by_document(model: Any, length: int) -> Iterator[None]:
    """Within it, the model attends so to rows of `length` tokens, where it is known how.

    Rows must be given without a mask: what stands after a row's last token sees, and is not seen.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if before != "sdpa" or not _takes(model, length):
        yield
        return
    attention_functions.choose(model, NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _takes(model: Any, length: int) -> bool:
    parameter = next(model.parameters())
    plain = parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.bfloat16)
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    return plain and bool(found) and all(_known(module, length) for module in found)


def _known(module: Any, length: int) -> bool:
    # Of Qwen each layer has its window, or none; of Mistral all have the config's.
    own = module if hasattr(module, "sliding_window") else module.config
    window = getattr(own, "sliding_window", None)
    origin = type(module).__module__.partition(".")[0]
    named = type(module).__name__ in KNOWN and origin == "transformers"
    return named and (window is None or length <= window)
