"""y = gain * (y + B (d * (A x))) + bias by segments, against the torch formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from base.kernels import LowRank, LowRankPlan, Segment, native, reference
from tests.base.kernels.guarded import Guarded, one_thread, unaligned

relaxed = settings(max_examples=20)


def random_term(width: int, out: int, rank: int, parts: int, dtype: torch.dtype) -> LowRank:
    """`parts`: bit 0 leaves d in, bit 1 the gain, bit 2 the bias."""
    return LowRank(
        (torch.randn(rank, width) / width**0.5).to(dtype) if rank else None,
        (torch.randn(out, rank) / rank**0.5).to(dtype) if rank else None,
        torch.randn(rank) if parts & 1 and rank else None,
        torch.randn(out) if parts & 2 else None,
        torch.randn(out) if parts & 4 else None,
    )


@one_thread()
def exact(y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
    return reference.lowrank_add(y.double(), x.double(), plan)


terms = st.lists(
    st.tuples(
        st.integers(0, 12), st.integers(0, 40), st.integers(0, 7), st.booleans(), st.booleans()
    ),
    max_size=6,
)


@relaxed
@given(width=st.integers(1, 100), out=st.integers(1, 140), pieces=terms)
def test_any_mix(
    kernels: native.Native, width: int, out: int, pieces: list[tuple[int, int, int, bool, bool]]
) -> None:
    segments, row = [], 0
    for count, rank, parts, stored_small, gap in pieces:
        dtype = torch.bfloat16 if stored_small else torch.float32
        row += gap  # a row of the base alone
        term = random_term(width, out, rank, parts, dtype)
        segments.append(Segment(row, row + count, term))
        row += count
    rows = row + 2
    if segments:  # a second term on rows that have one
        last = segments[-1]
        extra = random_term(width, out, 3, 0, torch.float32)
        segments.append(Segment(max(0, last.start - 1), last.stop, extra))
    plan = LowRankPlan(segments)
    x, before = unaligned(torch.randn(rows, width)), torch.randn(rows, out)
    y = Guarded(rows, out)
    y.inside.copy_(before)
    kernels.lowrank_add(y.inside, x, plan)
    y.check()
    right = exact(before, x, plan)
    assert torch.allclose(y.inside.double(), right, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_error_on_real_shapes(kernels: native.Native, dtype: torch.dtype) -> None:
    for width, out, rank in ((896, 4864, 16), (4864, 896, 8), (256, 768, 256)):
        plan = LowRankPlan(
            [
                Segment(0, 1, random_term(width, out, rank, 0, dtype)),
                Segment(1, 30, random_term(width, out, rank, 6, dtype)),
            ]
        )
        y, x = torch.randn(31, out), torch.randn(31, width)
        right = exact(y, x, plan)
        got = kernels.lowrank_add(y, x, plan)
        assert (got - right).abs().max() <= 1e-6 * right.abs().max()


def test_rows_of_no_segment_keep_their_bits(kernels: native.Native) -> None:
    plan = LowRankPlan([Segment(2, 4, random_term(64, 50, 8, 7, torch.float32))])
    before = torch.randn(6, 50)
    after = kernels.lowrank_add(before.clone(), torch.randn(6, 64), plan)
    assert torch.equal(after[[0, 1, 4, 5]], before[[0, 1, 4, 5]])
    assert not torch.equal(after[2:4], before[2:4])


@pytest.mark.parametrize("out", [64, 203])
def test_the_bits_of_a_row_depend_on_row_and_term_alone(kernels: native.Native, out: int) -> None:
    term = random_term(130, out, 21, 7, torch.float32)
    other = random_term(130, out, 5, 0, torch.bfloat16)
    x, y = torch.randn(60, 130), torch.randn(60, out)
    whole = kernels.lowrank_add(y.clone(), x, LowRankPlan([Segment(0, 60, term)]))
    for start, stop in ((0, 1), (59, 60), (7, 12), (3, 40)):
        segments = [Segment(start, stop, term)]
        if start:
            segments.insert(0, Segment(0, start, other))
        part = kernels.lowrank_add(y.clone(), x, LowRankPlan(segments))
        assert torch.equal(part[start:stop], whole[start:stop]), (start, stop)


def test_the_number_of_threads_changes_no_bit(kernels: native.Native) -> None:
    plan = LowRankPlan(
        [
            Segment(7 * i, 7 * i + 7, random_term(448, 333, 3 * i + 1, i, torch.float32))
            for i in range(8)
        ]
    )
    x, y = torch.randn(56, 448), torch.randn(56, 333)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(kernels.lowrank_add(y.clone(), x, plan))
    assert all(torch.equal(result, results[0]) for result in results)
