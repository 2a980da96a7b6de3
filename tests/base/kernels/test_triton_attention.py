"""Triton's paged attention against the torch formula in float64, where `triton_here` says."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from base.kernels import reference
from base.kernels.kv_rows import pack, unpack

pytestmark = [
    pytest.mark.cuda,
    # The interpreter's numpy says so of scores that are -inf and of the NaN nobody may read.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


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

    def run(self) -> Tensor:
        from base.kernels.triton_attention import paged_attention, serves

        assert serves(self.q, self.k)
        return paged_attention(
            *(self.q, self.k, self.v, self.tables, self.starts, self.contexts),
            *(self.q.shape[2] ** -0.5, self.window, self.softcap),
        )

    def exact(self) -> Tensor:
        dim = self.q.shape[2]
        caches = (unpack(c, dim).double().nan_to_num() for c in (self.k, self.v))
        return reference.paged_attention(
            *(self.q.double(), *caches, self.tables, self.starts, self.contexts),
            *(dim**-0.5, self.window, self.softcap),
        )

    def part(self, sequence: int, first: int, last: int) -> Case:
        """New tokens [first, last) of a sequence as a batch of their own."""
        start, stop = self.starts[sequence : sequence + 2].tolist()
        context = int(self.contexts[sequence]) - (stop - start) + last
        return replace(
            self,
            q=self.q[start + first : start + last].clone(),
            tables=self.tables[sequence : sequence + 1],
            starts=torch.tensor([0, last - first], dtype=torch.int32),
            contexts=torch.tensor([context], dtype=torch.int32),
        )


def batch(
    device: torch.device,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    page: int,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> Case:
    """Sequences of (new tokens, context); the last row of q belongs to none."""
    torch.manual_seed(len(lengths) + dim)
    pages = [-(-context // page) for _, context in lengths]
    order = torch.randperm(sum(pages) + 1)
    tables = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    shape = (sum(pages) + 1, page, heads[1], dim)
    k, v = (torch.randn(shape) for _ in range(2))
    unread = torch.ones(shape[:2], dtype=torch.bool)
    for i, (_, context) in enumerate(lengths):
        tables[i, : pages[i]] = order[sum(pages[:i]) : sum(pages[: i + 1])]
        slots = torch.arange(context)
        unread[tables[i, slots // page].long(), slots % page] = False
    k[unread], v[unread] = torch.nan, torch.nan
    news = [new for new, _ in lengths]
    starts = torch.tensor([0, *news]).cumsum(0).to(torch.int32)
    return Case(
        torch.randn(sum(news) + 1, heads[0], dim).to(device, dtype),
        pack(k, stored).to(device),
        pack(v, stored).to(device),
        tables.to(device),
        starts.to(device),
        torch.tensor([context for _, context in lengths], dtype=torch.int32).to(device),
    )


FLOAT, HALF, BYTES = torch.float32, torch.bfloat16, torch.int8


@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "page", "dtype", "stored", "window", "softcap"),
    [
        ([(1, 40), (1, 1), (5, 5)], (4, 2), 8, 16, FLOAT, FLOAT, 0, 0.0),
        ([(9, 41), (0, 3), (1, 33)], (7, 1), 20, 5, FLOAT, FLOAT, 0, 0.0),  # 7 heads share one
        ([(1, 70), (6, 70)], (2, 2), 16, 16, FLOAT, FLOAT, 3, 0.0),  # a tile is out of sight
        ([(3, 34)], (34, 2), 16, 16, FLOAT, FLOAT, 0, 2.0),  # 17 heads share one
        ([(2, 37), (1, 9)], (4, 2), 36, 16, FLOAT, BYTES, 0, 0.0),  # the last scale is of 4
        ([(2, 37), (1, 9)], (4, 2), 8, 16, FLOAT, HALF, 20, 5.0),
        ([(2, 37), (1, 9)], (4, 2), 8, 16, HALF, HALF, 0, 0.0),
        ([(2, 37), (1, 9)], (4, 2), 8, 16, torch.float16, BYTES, 0, 0.0),
    ],
)
def test_ragged_batches_against_float64(
    triton_here: torch.device,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    page: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    window: int,
    softcap: float,
) -> None:
    made = batch(triton_here, lengths, heads, dim, page, dtype, stored)
    case = replace(made, window=window, softcap=softcap)
    y, wanted = case.run(), case.exact()
    assert y.dtype is dtype
    assert torch.equal(y[-1], torch.zeros_like(y[-1]))
    bound = {FLOAT: 1e-6, HALF: 6e-3, torch.float16: 1e-3}[dtype]
    assert (y.double() - wanted).norm() / wanted.norm() < bound


@pytest.mark.parametrize("window", [0, 6])
def test_bits_do_not_depend_on_chunks_or_neighbours(triton_here: torch.device, window: int) -> None:
    lengths = [(3, 20), (21, 45), (1, 8)]
    case = replace(batch(triton_here, lengths, (4, 2), 8, 16, FLOAT, FLOAT), window=window)
    whole = case.run()[3:24]
    pieces = [case.part(1, 0, 10), case.part(1, 10, 20), case.part(1, 20, 21)]
    assert torch.equal(torch.cat([piece.run() for piece in pieces]), whole)


def test_pages_out_of_the_window_are_not_read(triton_here: torch.device) -> None:
    """Their places in the table may name pages that are another's by now."""
    case = replace(batch(triton_here, [(2, 40)], (2, 1), 8, 4, FLOAT, FLOAT), window=5)
    before = case.run()
    for cache in (case.k, case.v):
        cache[case.tables[0, :8].long()] = torch.nan  # keys 0 to 31; key 34 is the oldest seen
    assert torch.equal(case.run(), before)


def test_no_sequence_and_what_is_not_served(triton_here: torch.device) -> None:
    from base.kernels.triton_attention import serves

    case = batch(triton_here, [(1, 3)], (2, 1), 8, 4, FLOAT, FLOAT)
    none = replace(case, tables=case.tables[:0], starts=case.starts[:1], contexts=case.contexts[:0])
    assert torch.equal(none.run(), torch.zeros_like(case.q))
    assert not serves(case.q.double(), case.k)
    assert not serves(torch.zeros(1, 1, 6), torch.zeros(1, 1, 1, 10, dtype=torch.int8))


@pytest.mark.parametrize("heads", [(4, 2), (34, 2)])
def test_padding_of_a_captured_step_is_not_read(
    triton_here: torch.device, heads: tuple[int, int]
) -> None:
    """Rows of nobody, and sequences without rows whose context and pages are an older step's."""
    case = batch(triton_here, [(1, 20), (2, 9)], heads, 16, 16, FLOAT, FLOAT)
    size, width = 8, case.tables.shape[1]
    tables = torch.full((size, width), 10**6, dtype=torch.int32, device=triton_here)
    contexts = torch.full((size,), 10**6, dtype=torch.int32, device=triton_here)
    starts = torch.full((size + 1,), 3, dtype=torch.int32, device=triton_here)
    q = torch.full((size, *case.q.shape[1:]), torch.nan, device=triton_here)
    tables[:2], contexts[:2], starts[:3], q[:3] = (
        *(case.tables, case.contexts),
        *(case.starts, case.q[:3]),
    )
    y = replace(case, q=q, tables=tables, starts=starts, contexts=contexts).run()
    assert torch.equal(y[:3], case.run()[:3])
    assert torch.equal(y[3:], torch.zeros_like(y[3:]))
