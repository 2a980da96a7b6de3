"""The kernels in plain torch: slow, obvious, for any device and dtype. The oracle of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .kv_rows import unpack
from .lowrank import LowRankPlan
from .panels import BLOCK, PanelWeight
from .weight import NF4Weight

_FEW_ROWS = 32  # of x, up to which a float matrix on the CPU stands on the left
_TILE_ROWS = 1024  # rows of W that are dequantised at a time: bounds the fp32 copy


def nf4_linear(x: Tensor, weight: NF4Weight | PanelWeight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b: x [..., in] -> [..., out]."""
    return functional.linear(x, weight.dequantize(x.dtype), bias)


def fast_linear(
    x: Tensor, weight: PanelWeight, levels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b as the fast precision rounds, its sums in float64: x [T, in] -> [T, out].

    Each block of 64 values of x is round(127 x / m) * m / 127 with m = max |x|; the `levels` of a
    code are those of the instruction set, `Native.fast_levels` or, in 8 bits, `Native.fast_bytes`.
    """
    w = _of_levels(weight, levels)
    y = rounded_rows(x) @ w.t()
    return y if bias is None else y + bias.double()


def rounded_rows(x: Tensor) -> Tensor:
    """x [rows, in] as the fast products read it, in float64."""
    blocks = x.float().view(x.shape[0], -1, BLOCK)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # 127 / largest would be 127 * (1 / largest), rounded twice, and decide a tie otherwise.
    factor = torch.where(largest > 1e-36, torch.full_like(largest, 127) / largest, 0)
    return ((blocks * factor).round().double() * (largest.double() / 127)).view(x.shape)


def _of_levels(weight: PanelWeight, levels: Tensor) -> Tensor:
    codes, scales = weight.codes_and_scales(0, weight.shape[0])
    values = levels[codes.long()].view(weight.shape[0], -1, BLOCK) * scales.double()[..., None]
    return values.view(weight.shape)


def nf4_backward(grad_y: Tensor, weight: NF4Weight | PanelWeight) -> Tensor:
    """∂L/∂x = ∂L/∂y W, by tiles of rows of W: grad_y [..., out] -> [..., in]."""
    out, width = weight.shape
    grad_x = grad_y.new_zeros(*grad_y.shape[:-1], width)
    for start in range(0, out, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, out)
        grad_x += grad_y[..., start:stop] @ weight.dequantize_rows(start, stop, grad_y.dtype)
    return grad_x


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b; W is cast to x's dtype by tiles of rows, so that the copy stays small."""
    if weight.dtype == x.dtype:
        if x.is_cpu and x.numel() <= _FEW_ROWS * x.shape[-1]:
            return _few_rows(x, weight, bias)
        return functional.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    for start in range(0, weight.shape[0], _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        y[..., rows] = x @ weight[rows].to(x.dtype).t()
    return y if bias is None else y.add_(bias)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b as (W xᵀ)ᵀ + b: the CPU's library copies the right-hand side of a product into
    panels first, and an output head is the larger side by far."""
    y = (weight @ x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], weight.shape[0])


def dense_backward(grad_y: Tensor, weight: Tensor) -> Tensor:
    """∂L/∂x = ∂L/∂y W, W cast by tiles of rows: grad_y [..., out] -> [..., in]."""
    grad_x = grad_y.new_zeros(*grad_y.shape[:-1], weight.shape[1])
    for start in range(0, weight.shape[0], _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        grad_x += grad_y[..., rows] @ weight[rows].to(grad_y.dtype)
    return grad_x


def lowrank_add(y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
    """In place, by segment: y = gain * (y + B (d * (A x))) + bias."""
    for segment in plan.segments:
        rows = slice(segment.start, segment.stop)
        term = segment.term
        part = y[rows]
        if (matrices := term.matrices()) is not None:
            a, b = (matrix.to(x.dtype) for matrix in matrices)
            inner = x[rows] @ a.t()
            if term.d is not None:
                inner = inner * term.d.to(inner.dtype)
            part = part + (inner @ b.t()).to(part.dtype)
        if term.gain is not None:
            part = part * term.gain.to(part.dtype)
        if term.bias is not None:
            part = part + term.bias.to(part.dtype)
        y[rows] = part
    return y


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Sequence[int] | Tensor,
    context_len: Sequence[int] | Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(scale q Kᵀ + causal mask) V over paged keys and values; see the dispatch."""
    starts = [int(n) for n in query_start]
    contexts = [int(n) for n in context_len]
    block_size, groups = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    out = torch.zeros_like(q)
    for i, context in enumerate(contexts):
        rows = slice(starts[i], starts[i + 1])
        length = rows.stop - rows.start
        if length == 0:
            continue
        blocks = block_tables[i, : math.ceil(context / block_size)].long()
        k = unpack(k_cache[blocks].flatten(0, 1)[:context], q.shape[2], q.dtype)
        v = unpack(v_cache[blocks].flatten(0, 1)[:context], q.shape[2], q.dtype)
        k, v = (kept.repeat_interleave(groups, dim=1) for kept in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(context - length, context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)[None, :]
        hidden = key > position
        if sliding_window:
            hidden = hidden | (key <= position - sliding_window)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax and logsumexp of each row; torch's argmax takes the first of equals."""
    return logits.argmax(-1), logits.logsumexp(-1)


def largest(row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By a stable sort: torch.topk leaves the order of equals open."""
    values, places = row.sort(descending=True, stable=True)
    return values[:count], places[:count]
