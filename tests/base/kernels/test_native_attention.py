"""Paged attention from the C library, against the torch formula in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from base.kernels import native, reference
from base.kernels.kv_rows import pack, unpack
from tests.base.kernels.guarded import Guarded, one_thread, unaligned

relaxed = settings(max_examples=20)


@dataclass(frozen=True)
class Case:
    """A ragged batch over shuffled pages; keys and values that nobody may read are NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Tensor
    starts: Tensor
    contexts: Tensor
    window: int = 0
    softcap: float = 0.0

    def run(self, kernels: native.Native, out: Tensor | None = None) -> Tensor:
        indices = (self.tables, self.starts, self.contexts)
        scale = self.q.shape[2] ** -0.5
        caches = (self.k, self.v)
        return kernels.paged_attention(
            self.q, *caches, *indices, scale, self.window, self.softcap, out
        )

    @one_thread()
    def exact(self) -> Tensor:
        return reference.paged_attention(
            self.q.double(),
            self._readable(self.k),
            self._readable(self.v),
            self.tables.clamp(min=0),
            self.starts,
            self.contexts,
            self.q.shape[2] ** -0.5,
            self.window,
            self.softcap,
        )

    def _readable(self, cache: Tensor) -> Tensor:
        return unpack(cache, self.q.shape[2]).nan_to_num()

    def alone(self, sequence: int, first: int = 0, last: int | None = None) -> Case:
        """The same sequence as a batch of its own, cut to some of its new tokens."""
        start, stop = self.starts[sequence : sequence + 2].tolist()
        last = stop - start if last is None else last
        context = int(self.contexts[sequence]) - (stop - start) + last
        return replace(
            self,
            q=self.q[start + first : start + last].contiguous(),
            tables=self.tables[sequence : sequence + 1],
            starts=torch.tensor([0, last - first], dtype=torch.int32),
            contexts=torch.tensor([context], dtype=torch.int32),
        )


def make(
    sequences: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    window: int = 0,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """`sequences`: (new tokens, keys before them)."""
    counts = torch.tensor([0] + [new for new, _ in sequences], dtype=torch.int32)
    contexts = [new + before for new, before in sequences]
    pages = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(pages) + 3).int().tolist()
    shape = (len(order), block_size, kv_heads, dim)
    k, v = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    tables = torch.full((len(sequences), max(pages) + 1), -1, dtype=torch.int32)
    for i, (new, before) in enumerate(sequences):
        # What has left the window of the first new token may have been given away.
        seen = max(0, before + 1 - window) if window else 0
        own = torch.tensor([order.pop() for _ in range(pages[i])])
        at = torch.arange(seen, new + before)
        tables[i, seen // block_size : pages[i]] = own[seen // block_size :].int()
        place = own[at // block_size] * block_size + at % block_size
        k.flatten(0, 1)[place] = torch.randn(len(at), kv_heads, dim)
        v.flatten(0, 1)[place] = torch.randn(len(at), kv_heads, dim)
    return Case(
        unaligned(torch.randn(int(counts.sum()), heads, dim)),
        pack(k, dtype),
        pack(v, dtype),
        tables,
        counts.cumsum(0).int(),
        torch.tensor(contexts, dtype=torch.int32),
        window,
        softcap,
    )


@relaxed
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (14, 2), (6, 1), (8, 2), (50, 1)]),
    dim=st.integers(1, 16).map(lambda n: 8 * n) | st.integers(1, 20),
    block_size=st.integers(1, 40),
    window=st.sampled_from([0, 1, 7, 32, 50]),
    softcap=st.sampled_from([0.0, 2.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)
@example([(1, 0)], (14, 2), 64, 16, 0, 0.0, torch.float32)
@example([(33, 64), (1, 31), (1, 32)], (14, 2), 64, 16, 0, 0.0, torch.float32)
@example([(33, 64), (1, 31), (1, 32)], (14, 2), 64, 16, 0, 0.0, torch.int8)
@example([(3, 64), (1, 31)], (4, 2), 33, 16, 7, 0.0, torch.int8)
def test_any_batch(
    kernels: native.Native,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    window: int,
    softcap: float,
    dtype: torch.dtype,
) -> None:
    case = make(sequences, *heads, dim, block_size, window, softcap, dtype)
    out = Guarded(*case.q.shape)
    case.run(kernels, out.inside)
    out.check()
    right = case.exact()
    assert (out.inside - right).abs().max() <= 2e-6 * right.abs().max()


def test_relative_error_on_a_long_context(kernels: native.Native) -> None:
    case = make([(70, 900), (1, 1500)], 14, 2, 64, 16)
    right = case.exact()
    assert (case.run(kernels) - right).abs().max() <= 2e-6 * right.abs().max()


@pytest.mark.parametrize(
    ("window", "softcap", "dtype"),
    [
        (0, 0.0, torch.float32),
        (40, 0.0, torch.float32),
        (0, 20.0, torch.float32),
        (0, 0.0, torch.bfloat16),
        (40, 0.0, torch.int8),
    ],
)
def test_bits_do_not_depend_on_batch_or_chunks(
    kernels: native.Native, window: int, softcap: float, dtype: torch.dtype
) -> None:
    case = make([(50, 13), (1, 77), (64, 0), (1, 0)], 14, 2, 64, 16, window, softcap, dtype)
    whole = case.run(kernels)
    for i in range(4):
        start, stop = case.starts[i : i + 2].tolist()
        assert torch.equal(case.alone(i).run(kernels), whole[start:stop])
    for first, last in ((0, 1), (0, 17), (17, 64), (63, 64), (30, 33)):
        assert torch.equal(case.alone(2, first, last).run(kernels), whole[51 + first : 51 + last])


def test_bits_do_not_depend_on_pages(kernels: native.Native) -> None:
    """The same keys in pages of another size: tiles follow positions, not pages."""
    case = make([(5, 60)], 4, 2, 32, 16)
    flat_k = case.k[case.tables[0, :5].long()].flatten(0, 1)[:65]
    flat_v = case.v[case.tables[0, :5].long()].flatten(0, 1)[:65]
    table = torch.arange(13, dtype=torch.int32)[None]
    other = replace(case, k=flat_k.view(13, 5, 2, 32), v=flat_v.view(13, 5, 2, 32), tables=table)
    assert torch.equal(other.run(kernels), case.run(kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_number_of_threads_changes_no_bit(kernels: native.Native, dtype: torch.dtype) -> None:
    case = make([(40, 100), (1, 300), (90, 0)], 14, 2, 64, 16, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(case.run(kernels))
    assert all(torch.equal(result, results[0]) for result in results)


def test_large_scores_do_not_overflow(kernels: native.Native) -> None:
    case = make([(20, 40)], 4, 2, 64, 16)
    case = replace(case, q=case.q * 1000)
    right = case.exact()
    assert torch.allclose(case.run(kernels).double(), right, atol=1e-2)


def test_a_nan_key_is_not_hidden(kernels: native.Native) -> None:
    case = make([(3, 4)], 2, 1, 8, 16)
    case.k[case.tables[0, 0], 2] = float("nan")
    assert case.run(kernels).isnan().all()


def test_refuses_indices_that_point_outside(kernels: native.Native) -> None:
    case = make([(3, 20), (2, 2)], 4, 2, 16, 8)
    beyond = case.tables.clone()
    beyond[0, 1] = case.k.shape[0]
    for wrong in (
        {"tables": beyond},
        {"tables": torch.full_like(case.tables, -1)},
        {"contexts": case.contexts + 40},
        {"contexts": case.contexts - 21},
        {"starts": torch.tensor([0, 3, 6], dtype=torch.int32)},
        {"starts": torch.tensor([0, 6, 5], dtype=torch.int32)},
        {"starts": torch.tensor([-1, 3, 5], dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match="point outside"):
            replace(case, **wrong).run(kernels)
