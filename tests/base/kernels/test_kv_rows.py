"""Keys and values in a cache: what is kept of them, by the C library and by torch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base import kernels as dispatch
from base.kernels import native
from base.kernels.kv_rows import pack, stored_bytes, stored_width, unpack
from tests.base.kernels.guarded import unaligned

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
relaxed = settings(max_examples=25)


@relaxed
@given(
    tokens=st.integers(0, 90),
    heads=st.integers(1, 5),
    dim=st.integers(1, 140),
    block_size=st.integers(1, 20),
    threads=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_the_library_keeps_what_torch_keeps(
    kernels: native.Native,
    tokens: int,
    heads: int,
    dim: int,
    block_size: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    torch.set_num_threads(threads)
    blocks = -(-tokens // block_size) + 1
    slots = torch.randperm(blocks * block_size)[:tokens]
    x = unaligned(torch.randn(tokens, heads, dim) * torch.rand(tokens, heads, 1))
    caches = [
        torch.full((blocks, block_size, heads, stored_width(dim, dtype)), 3, dtype=dtype)
        for _ in range(2)
    ]
    kernels.cache_write(caches[0], slots, x)
    caches[1].flatten(0, 1).index_copy_(0, slots, pack(x, dtype))
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))


@pytest.mark.parametrize("dim", [1, 20, 32, 64, 100])
def test_the_error_is_half_a_step(dim: int) -> None:
    x = torch.randn(7, 3, dim) * 10 ** torch.linspace(-6, 6, 7)[:, None, None]
    for dtype, step in ((torch.float32, 0.0), (torch.bfloat16, 2**-8), (torch.int8, 1 / 253.9)):
        kept = pack(x, dtype)
        assert kept.shape == (7, 3, stored_width(dim, dtype))
        assert kept[0, 0].nbytes == stored_bytes(dim, dtype)
        for start in range(0, dim, 32):
            part = slice(start, start + 32)
            wrong = (unpack(kept, dim) - x)[..., part].abs().amax(-1)
            assert (wrong <= step * x[..., part].abs().amax(-1)).all()
    assert stored_bytes(64, torch.int8) == 72  # where float32 takes 256


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_read_back_so_and_stays_apart(
    kernels: native.Native, dtype: torch.dtype
) -> None:
    x = torch.randn(6, 2, 40)
    x[0, 0, 3], x[1, 1, 39], x[2, 0, 0] = float("nan"), float("inf"), -float("inf")
    x[3, 0], x[4, 1] = 0.0, 1e-40
    cache = pack(torch.zeros(2, 4, 2, 40), dtype)
    kernels.cache_write(cache, torch.arange(6), x)
    back = unpack(cache, 40).flatten(0, 1)[:6]
    assert torch.equal(back.nan_to_num(7.0), unpack(pack(x, dtype), 40).nan_to_num(7.0))
    for token, head, place in ((0, 0, 3), (1, 1, 39), (2, 0, 0)):
        assert not back[token, head, place].isfinite()
    assert back[3:].isfinite().all()
    assert back[0, 1].isfinite().all()
    assert not back[3, 0].any()
    assert back[4, 1].abs().max() <= 1e-36


def test_refuses_slots_outside(kernels: native.Native) -> None:
    cache, x = torch.zeros(2, 4, 1, 8), torch.randn(1, 1, 8)
    for slot in (-1, 8):
        with pytest.raises(ValueError, match="0 to 7"):
            kernels.cache_write(cache, torch.tensor([slot]), x)
    assert not cache.any()


def test_without_the_library_torch_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_native", None)
    cache, x = pack(torch.zeros(2, 4, 1, 40), torch.int8), torch.randn(2, 1, 40)
    dispatch.cache_write(cache, torch.tensor([1, 6]), x)
    assert torch.equal(cache.flatten(0, 1)[[1, 6]], pack(x, torch.int8))
