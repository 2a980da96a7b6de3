"""Causal attention over a paged cache on CUDA, decode and chunked prefill in one kernel.

For each query row: softmax(scale q Kᵀ + mask) V, by tiles of KEYS keys with a running maximum and
a running sum in float32 (Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax"). A program takes the heads that share a key head, for as many tokens as fit into ROWS.

Tiles of keys begin at multiples of KEYS. A tile that a row does not see adds exact zeros to it,
so the bits of a row do not depend on how the prompt was chunked or on other sequences.
"""
# mypy: disable-error-code="no-untyped-def", allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kv_rows import GROUP
from .triton_arithmetic import add_product, rounded

ROWS = 16  # query rows of one program: the least that the matrix units take
KEYS = 32  # of a tile


@triton.jit
def _sequence(starts, sequences, tile, TOKENS: tl.constexpr):
    """The last i with starts[i] // TOKENS + i <= tile: the sequence that a tile belongs to.

    Sequence i has at most ceil(length / TOKENS) tiles, which fit between its number and the next.
    """
    low: tl.int32 = 0
    high: tl.int32 = sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _vectors(
    cache,
    scales,
    slots,
    mask,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    dtype: tl.constexpr,
):
    """Keys or values of the slots, [slots, PADDED] in dtype; those in 8 bits times their scale."""
    places = tl.arange(0, PADDED)
    inside = mask[:, None] & (places < DIM)[None, :]
    kept = tl.load(cache + slots[:, None] * WIDTH + places[None, :], mask=inside, other=0)
    if cache.dtype.element_ty == tl.int8:
        where = slots[:, None] * (WIDTH // 4) + DIM // 4 + places[None, :] // GROUP
        factor = tl.load(scales + where, mask=inside, other=0.0)
        return rounded(kept.to(tl.float32) * factor, dtype)
    elif cache.dtype.element_ty == dtype:
        return kept
    else:
        return rounded(kept.to(tl.float32), dtype)


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    tables,
    starts,
    contexts,
    y,
    sequences,
    pages,
    scale,
    window,
    softcap,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    sequence = _sequence(starts, sequences, tile, TOKENS)
    start, stop = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = (tile - (start // TOKENS + sequence)) * TOKENS + start
    if first >= stop:
        return
    SHARE: tl.constexpr = HEADS // KEY_HEADS
    row = tl.arange(0, ROWS)
    token = first + row // SHARE
    live = (row < TOKENS * SHARE) & (token < stop)
    head = key_head * SHARE + row % SHARE
    places = tl.arange(0, PADDED)
    inside = live[:, None] & (places < DIM)[None, :]
    where = (token.to(tl.int64) * HEADS + head)[:, None] * DIM + places[None, :]
    queries = tl.load(q + where, mask=inside, other=0.0)
    context = tl.load(contexts + sequence)
    position = context - stop + token  # of each query row, from 0
    end = tl.minimum(context, context - stop + first + TOKENS)
    oldest = 0  # key that any row here sees; pages before it may belong to others by now
    if WINDOWED:
        oldest = tl.maximum(context - stop + first - window + 1, 0)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for key_start in range(oldest // KEYS * KEYS, end, KEYS):
        key = key_start + tl.arange(0, KEYS)
        known = (key >= oldest) & (key < end)
        page = tl.load(tables + sequence.to(tl.int64) * pages + key // PAGE, mask=known, other=0)
        slots = (page.to(tl.int64) * PAGE + key % PAGE) * KEY_HEADS + key_head
        keys = _vectors(
            k_cache, k_scales, slots, known, DIM, WIDTH, PADDED, GROUP, q.dtype.element_ty
        )
        scores = add_product(tl.zeros((ROWS, KEYS), tl.float32), queries, tl.trans(keys)) * scale
        if CAPPED:  # c tanh(s / c), with the exponential of a number that is not positive
            small = tl.exp(-2.0 * tl.abs(scores / softcap))
            bent = softcap * (1.0 - small) / (1.0 + small)
            scores = tl.where(scores < 0, -bent, bent)
        seen = known[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # no key seen yet: exp(-inf) below
        shares = tl.exp(scores - base[:, None])
        kept = tl.exp(largest - base)
        values = _vectors(
            v_cache, v_scales, slots, known, DIM, WIDTH, PADDED, GROUP, q.dtype.element_ty
        )
        weight = weight * kept + tl.sum(shares, 1)
        total = add_product(total * kept[:, None], rounded(shares, q.dtype.element_ty), values)
        largest = higher
    result = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(y + where, rounded(result, y.dtype.element_ty), mask=inside)


def serves(q: Tensor, cache: Tensor) -> bool:
    """Are these shapes and dtypes among those that the kernel reads?"""
    in_bytes = cache.dtype is torch.int8
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return q.dtype in floats and (q.shape[2] % 4 == 0 if in_bytes else cache.dtype in floats)


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
    """q [T, H, D] -> [T, H, D]; arguments, and what they were checked for, as in the dispatch.

    The index tensors may lie anywhere; those on q's device cost no copy. Rows of no sequence are
    zeros. Both caches are contiguous; in int8, D is a multiple of 4.
    """
    q = q.contiguous()
    y = torch.zeros_like(q)
    sequences, (tokens, heads, dim) = block_tables.shape[0], q.shape
    key_heads = k_cache.shape[2]
    if not sequences or not y.numel():
        return y
    index = [
        tensor.to(device=q.device, dtype=torch.int32).contiguous()
        for tensor in (block_tables, query_start, context_len)
    ]
    in_bytes = k_cache.dtype is torch.int8
    scales = [c.view(torch.float32) if in_bytes else c for c in (k_cache, v_cache)]
    rows = max(ROWS, triton.next_power_of_2(heads // key_heads))
    at_once = rows // (heads // key_heads)
    _attend[(tokens // at_once + sequences, key_heads)](
        *(q, k_cache, v_cache, *scales, *index, y),
        *(sequences, block_tables.shape[1], scale, sliding_window, softcap),
        HEADS=heads,
        KEY_HEADS=key_heads,
        DIM=dim,
        WIDTH=k_cache.shape[3],
        PADDED=max(16, triton.next_power_of_2(dim)),
        PAGE=k_cache.shape[1],
        GROUP=GROUP,
        TOKENS=at_once,
        ROWS=rows,
        KEYS=KEYS,
        WINDOWED=sliding_window > 0,
        CAPPED=softcap != 0.0,
    )
    return y
