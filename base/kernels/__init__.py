"""The products of the serving path, and the one place that picks who computes them.

- float32 on the CPU: the C library, where it was built
- CUDA: bitsandbytes' fused NF4 product; Triton for adapters and attention where it is installed and
  passes a check on that device (triton_check.py); plain torch for the rest
- anything else: `reference`, plain torch

Nothing outside this package imports its modules; they come through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import cuda, native, reference, tiles
from .decoder import (
    PLACES,
    STORED,
    AdapterTable,
    CachePages,
    DecoderHalves,
    LayerRecord,
    Room,
    Spans,
    StepPages,
    StepRecord,
)
from .decoder import Linear as LinearPlace
from .decoder import Norm as NormPlace
from .graphs import Recorder, Staged, recorder_for
from .kv_rows import pack, stored_bytes, stored_width, unpack
from .lowrank import LowRank, LowRankPlan, Segment
from .panels import BLOCK, PanelWeight, can_pack
from .rounded import RoundedFactor
from .slots import MOST_ROWS, SlotPlan, SlotTable
from .slots import serves as slot_serves
from .steps import Steps
from .weight import NF4Weight

__all__ = [
    "BLOCK",
    "MOST_ROWS",
    "PLACES",
    "AdapterTable",
    "CachePages",
    "DecoderHalves",
    "LayerRecord",
    "LinearPlace",
    "LowRank",
    "LowRankPlan",
    "NF4Weight",
    "NormPlace",
    "PanelWeight",
    "Precision",
    "Recorder",
    "Room",
    "RoundedFactor",
    "Segment",
    "SlotPlan",
    "SlotTable",
    "Spans",
    "Staged",
    "StepPages",
    "StepRecord",
    "Steps",
    "Weight",
    "cache_write",
    "decoder_halves",
    "dense_linear",
    "fast_status",
    "greedy",
    "largest",
    "linears",
    "lowrank_add",
    "native_status",
    "nf4_backward",
    "nf4_linear",
    "nf4_training_product",
    "pack",
    "paged_attention",
    "panels_serve",
    "recorder_for",
    "slot_serves",
    "steps",
    "stored_bytes",
    "stored_width",
    "unpack",
    "with_precision",
]


Precision = Literal["exact", "fast"]
Weight = NF4Weight | PanelWeight  # what the layout is decides the precision of a product

_native, _status = native.load()


def native_status() -> str:
    """One line for people: which instruction set the C library runs on, or why it does not."""
    return _status


def fast_status() -> str:
    """One line for people: what the fast products run on, or why all are exact."""
    return "exact everywhere: no C library" if _native is None else _native.fast_isa


def panels_serve() -> bool:
    """Are there products over panels here, so that `fast` differs from `exact` on the CPU?"""
    return _native is not None


def with_precision(weight: NF4Weight, precision: Precision) -> Weight:
    """The weight in the layout of a precision: `fast` moves it to panels, for good.

    It stays as it is, and so exact, without the C library, off the CPU, and where rows or blocks
    are no multiple of 64.
    """
    if precision == "exact" or _native is None or not weight.on_cpu or not can_pack(weight):
        return weight
    return PanelWeight.pack(weight)


def nf4_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b with W in NF4: x [..., in] -> y [..., out]. Differentiable in x and bias.

    With the C library the bits of a row of y depend on that row of x alone: not on how many rows
    there are, where it stands among them, or the number of threads. A `PanelWeight` multiplies in
    8 bits (csrc/fast.h): an error of about 8e-3 of the result's norm; its gradient is exact.
    Where a gradient is asked for, many rows are multiplied by tiles of W in floats instead, and
    the backward product always is: there the last bits may depend on the number of rows.
    """
    _check_linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _NF4Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return _forward(x, weight, bias)


def linears(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """x Wᵀ + b for several weights that read the same x, as Q, K and V do.

    Weights in panels round x once for all of them. The bits are those of `nf4_linear`, one by one.
    """
    biases = biases or [None] * len(weights)
    together = (
        _native is not None
        and _native_takes(x)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and all(isinstance(weight, PanelWeight) and weight.on_cpu for weight in weights)
        and all(bias is None or _native_takes(bias) for bias in biases)
    )
    if not together or _native is None:
        pairs = zip(weights, biases, strict=True)
        return [nf4_linear(x, weight, bias) for weight, bias in pairs]
    for weight, bias in zip(weights, biases, strict=True):
        _check_linear(x, weight, bias)
    panels = [weight for weight in weights if isinstance(weight, PanelWeight)]
    firm = [None if bias is None else bias.contiguous() for bias in biases]
    return list(_native.fast_linears(x.contiguous(), panels, firm))


def _check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight needs {weight.shape[1]}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")


def _forward(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if (
        _native is not None
        and weight.on_cpu
        and _native_takes(x)
        and (bias is None or _native_takes(bias))
    ):
        bias = None if bias is None else bias.contiguous()
        if isinstance(weight, PanelWeight):
            return _native.fast_linears(x.contiguous(), [weight], [bias])[0]
        return _native.nf4_linear(x.contiguous(), weight, bias)
    if x.is_cuda and isinstance(weight, NF4Weight):
        return cuda.nf4_linear(x, weight, bias)
    return reference.nf4_linear(x, weight, bias)


def _native_takes(tensor: Tensor) -> bool:
    """Is this what the C library reads: float32 on the CPU?"""
    return tensor.dtype is torch.float32 and tensor.is_cpu


class _NF4Product(torch.autograd.Function):
    """x Wᵀ; W is frozen, so the gradient of x is all there is, and nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return nf4_training_product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return nf4_backward(grads[0], ctx.weight), None


def nf4_training_product(x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ as `nf4_linear` computes it where a gradient is asked for; itself it records none."""
    many = x.numel() >= tiles.MANY_ROWS * x.shape[-1]
    exact = isinstance(weight, NF4Weight)
    if many and exact and _native is not None and _native_takes(x) and tiles.takes(weight):
        return tiles.multiply(_native, x, weight)
    return _forward(x, weight, None)


def nf4_backward(grad_y: Tensor, weight: Weight) -> Tensor:
    """∂L/∂x = ∂L/∂y W: grad_y [..., out] -> [..., in]; W is made floats by tiles of rows."""
    if _native is not None and _native_takes(grad_y) and tiles.takes(weight):
        return tiles.backward(_native, grad_y, weight)
    return reference.nf4_backward(grad_y, weight)


def steps() -> Steps | None:
    """The C functions beside the products, for float32 on the CPU; None where torch serves."""
    return None if _native is None else _native.steps


def decoder_halves() -> DecoderHalves | None:
    """Half a decoder layer in one call, for float32 on the CPU; None where torch serves."""
    return None if _native is None else _native.halves


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b with W [out, in] kept in its own dtype: x [..., in] -> y [..., out] in x's.

    Differentiable in x. With the C library (float32 x on the CPU, W in float32 or bfloat16) the
    bits of a row of y depend on that row of x alone.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight needs {weight.shape[1]}")
    if bias is not None:
        bias = bias.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _DenseProduct.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return _dense_forward(x, weight, bias)


def _dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if (
        _native is not None
        and _native_takes(x)
        and weight.is_cpu
        and weight.dtype in (torch.float32, torch.bfloat16)
    ):
        bias = None if bias is None else bias.contiguous()
        return _native.steps.dense_linear(x.contiguous(), weight.contiguous(), bias)
    return reference.dense_linear(x, weight, bias)


class _DenseProduct(torch.autograd.Function):
    """x Wᵀ with a frozen W, which may be in another dtype than x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return _dense_forward(x, weight, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reference.dense_backward(grads[0], ctx.weight), None


def lowrank_add(y: Tensor, x: Tensor, terms: LowRankPlan | SlotPlan | Sequence[Segment]) -> Tensor:
    """In place for each segment of rows: y = gain * (y + B (d * (A x))) + bias. Returns y.

    y [T, out], x [T, in]. Build a `LowRankPlan` once for a batch and a layer and pass it in:
    a bare sequence is checked and laid out again on each call. Not differentiable. A `SlotPlan`
    says at run time whose rows they are: for steps that are captured (slots.py).
    """
    if isinstance(terms, SlotPlan):
        if y.is_cuda:
            return cuda.slots_add(y, x, terms)
        terms = terms.resolved(y.shape[1], x.shape[1])
    plan = terms if isinstance(terms, LowRankPlan) else LowRankPlan(terms)
    plan.check(y, x)
    if (
        _native is not None
        and plan.on_cpu
        and _native_takes(y)
        and _native_takes(x)
        and y.is_contiguous()
    ):
        return _native.lowrank_add(y, x.contiguous(), plan)
    if cuda.takes_lowrank(y, x, plan):
        return cuda.lowrank_add(y, x, plan)
    return reference.lowrank_add(y, x, plan)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The argmax [rows] and the logsumexp [rows] of logits [rows, width], width > 0.

    Of equals the first, of NaN the first too, as `torch.argmax`; the sum of a row with NaN is NaN,
    with +inf +inf. With the C library the bits of a row depend on that row alone.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [rows, width > 0], got {list(logits.shape)}")
    if _native is not None and _native_takes(logits) and logits.stride(1) == 1:
        return _native.steps.greedy(logits)
    return reference.greedy(logits)


def largest(row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of a row [width], largest first, and their places.

    Of equals the first; NaN is above all numbers.
    """
    if row.dim() != 1 or not 0 <= count <= len(row):
        raise ValueError(f"{count} values of a row {list(row.shape)} cannot be found")
    if _native is not None and _native_takes(row) and row.is_contiguous() and count:
        return _native.steps.largest(row, count)
    return reference.largest(row, count)


def cache_write(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Keep keys or values x [T, Hkv, D] at slots [T] of a cache [NB, BS, Hkv, W], in its dtype.

    A slot is page * BS + offset; none comes twice. What is kept of a vector depends on that vector
    alone. Raises ValueError, or IndexError, for a slot outside the cache.
    """
    if (
        _native is not None
        and _native_takes(x)
        and cache.is_cpu
        and cache.dtype in STORED
        and cache.is_contiguous()
    ):
        _native.cache_write(cache, slots.to("cpu", torch.int64).contiguous(), x.contiguous())
    else:
        cache.flatten(0, 1).index_copy_(0, slots, pack(x, cache.dtype))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of a ragged batch over a paged cache: decode and chunked prefill alike.

    q            [T, H, D]        the new tokens of all sequences, laid end to end
    k_cache      [NB, BS, Hkv, W] pages; keys of the new tokens are already written. H % Hkv == 0
    v_cache      [NB, BS, Hkv, W]; W = stored_width(D, its dtype)
    block_tables [S, MB] int32    page numbers of each sequence, in order
    query_start  [S + 1] int32    sequence i owns rows query_start[i] to query_start[i + 1]
    context_len  [S] int32        keys that the last token of a sequence sees, itself included
    scale                         factor of q·k
    sliding_window                0, or the number of keys a token sees at most, itself included
    softcap                       0, or c: scores become c tanh(score / c)
    returns      [T, H, D]

    Keep the three index tensors on the CPU for a CPU cache. float32; a cache in bfloat16 or int8
    (kv_rows.py) is read too, each vector widened to float32 as it is read.
    """
    _check_attention(q, k_cache, v_cache, block_tables, query_start, context_len)
    if (
        _native is not None
        and _native_takes(q)
        and k_cache.dtype == v_cache.dtype
        and k_cache.dtype in STORED
        and all(c.device.type == "cpu" and c.is_contiguous() for c in (k_cache, v_cache))
    ):
        return _native.paged_attention(
            q.contiguous(),
            k_cache,
            v_cache,
            _index(block_tables),
            _index(query_start),
            _index(context_len),
            scale,
            sliding_window,
            softcap,
        )
    operands = (q, k_cache, v_cache, block_tables, query_start, context_len)
    if cuda.takes_attention(q, k_cache, v_cache):
        return cuda.paged_attention(*operands, scale, sliding_window, softcap)
    return reference.paged_attention(*operands, scale, sliding_window, softcap)


def _index(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.int32).contiguous()


def _check_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, starts: Tensor, contexts: Tensor
) -> None:
    fit = q.dim() == 3 and k.dim() == 4 and k.shape == v.shape
    if not fit or k.shape[3] != stored_width(q.shape[2], k.dtype):
        raise ValueError(
            "q must be [T, H, D] and both caches [NB, BS, Hkv, D], or wider in int8, got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[1] % k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[2]} key heads evenly")
    sequences = tables.shape[0]
    if tables.dim() != 2 or starts.shape != (sequences + 1,) or contexts.shape != (sequences,):
        raise ValueError(
            "block_tables must be [S, MB], query_start [S + 1] and context_len [S], got "
            f"{list(tables.shape)}, {list(starts.shape)} and {list(contexts.shape)}"
        )
