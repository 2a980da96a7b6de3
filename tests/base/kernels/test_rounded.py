"""Low-rank terms in 8 bits, by an oracle that rounds alike; and what the rounding costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from base import kernels as dispatch
from base.kernels import LowRank, LowRankPlan, RoundedFactor, Segment, native, reference
from tests.base.kernels.guarded import Guarded, one_thread, unaligned

relaxed = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def term_of(width: int, out: int, rank: int, parts: int = 0) -> LowRank:
    """`parts`: bit 0 leaves d in, bit 1 the gain, bit 2 the bias."""
    return LowRank(
        RoundedFactor.of_a(torch.randn(rank, width) / width**0.5) if rank else None,
        RoundedFactor.of_b(torch.randn(out, rank) / rank**0.5) if rank else None,
        torch.randn(rank) if parts & 1 and rank else None,
        torch.randn(out) if parts & 2 else None,
        torch.randn(out) if parts & 4 else None,
    )


@one_thread()
def right(y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
    """In float64, with x rounded where a term reads it rounded."""
    y = y.double()
    for segment in plan.segments:
        read = reference.rounded_rows(x) if segment.term.rounded else x.double()
        y = reference.lowrank_add(y, read, LowRankPlan([segment]))
    return y


@pytest.mark.parametrize(("rank", "width", "out"), [(1, 64, 1), (8, 128, 32), (13, 192, 70)])
def test_a_number_is_at_most_half_a_step_off(rank: int, width: int, out: int) -> None:
    a, b = torch.randn(rank, width), torch.randn(out, rank)
    a[0], b[:, 0] = 0, 1e-42
    kept_a, kept_b = RoundedFactor.of_a(a), RoundedFactor.of_b(b)
    assert kept_a.dense().shape == a.shape
    assert kept_b.dense().shape == b.shape
    steps_a = a.view(rank, -1, 64).abs().amax(-1, keepdim=True).expand(-1, -1, 64) / 254
    assert ((kept_a.dense() - a).abs() <= steps_a.reshape(a.shape) * 1.001).all()
    for first in range(0, out, 32):
        part = b[first : first + 32]
        off = (kept_b.dense()[first : first + 32] - part).abs()
        assert (off <= part.abs().amax(0) / 254 * 1.001 + 1e-41).all()
    whole = RoundedFactor.of_a(kept_a.dense())
    assert torch.equal(whole.dense(), kept_a.dense()), "rounding again changes nothing"


@relaxed
@given(
    blocks=st.integers(1, 5),
    out=st.integers(1, 140),
    pieces=st.lists(
        st.tuples(
            st.integers(0, 14), st.integers(0, 40), st.integers(0, 7), st.booleans(), st.booleans()
        ),
        max_size=6,
    ),
)
@example(blocks=2, out=33, pieces=[(13, 8, 7, True, False), (1, 9, 0, True, True)])
@example(blocks=1, out=64, pieces=[(5, 0, 6, True, False), (30, 33, 2, True, False)])
def test_any_mix(
    kernels: native.Native,
    blocks: int,
    out: int,
    pieces: list[tuple[int, int, int, bool, bool]],
) -> None:
    width, row, segments = 64 * blocks, 0, []
    for count, rank, parts, is_rounded, gap in pieces:
        row += gap
        term = term_of(width, out, rank, parts)
        if not is_rounded and (matrices := term.matrices()):
            term = LowRank(*matrices, term.d, term.gain, term.bias)
        segments.append(Segment(row, row + count, term))
        row += count
    if segments:  # a second term on rows that have one
        last = segments[-1]
        segments.append(Segment(max(0, last.start - 1), last.stop, term_of(width, out, 3)))
    plan, rows = LowRankPlan(segments), row + 2
    x, before = unaligned(torch.randn(rows, width)), torch.randn(rows, out)
    y = Guarded(rows, out)
    y.inside.copy_(before)
    kernels.lowrank_add(y.inside, x, plan)
    y.check()
    assert torch.allclose(y.inside.double(), right(before, x, plan), rtol=2e-6, atol=2e-5)


def test_the_stated_error(kernels: native.Native) -> None:
    """1.3 % of what a term of normal factors adds to a normal x."""
    for width, out, rank in ((896, 4864, 16), (4864, 896, 8), (256, 768, 64)):
        a, b = torch.randn(rank, width), torch.randn(out, rank)
        x = torch.randn(9, width)
        term = LowRank(RoundedFactor.of_a(a), RoundedFactor.of_b(b))
        got = kernels.lowrank_add(torch.zeros(9, out), x, LowRankPlan([Segment(0, 9, term)]))
        wanted = x @ a.t() @ b.t()
        assert 0 < (got - wanted).norm() <= 0.013 * wanted.norm()


@pytest.mark.parametrize("out", [64, 203])
def test_the_bits_of_a_row_depend_on_row_and_term_alone(kernels: native.Native, out: int) -> None:
    term, other = term_of(192, out, 21, 7), term_of(192, out, 5)
    x, y = torch.randn(60, 192), torch.randn(60, out)
    whole = kernels.lowrank_add(y.clone(), x, LowRankPlan([Segment(0, 60, term)]))
    for start, stop in ((0, 1), (59, 60), (7, 12), (3, 40)):
        segments = [Segment(start, stop, term)]
        if start:
            segments.insert(0, Segment(0, start, other))
        part = kernels.lowrank_add(y.clone(), x, LowRankPlan(segments))
        assert torch.equal(part[start:stop], whole[start:stop]), (start, stop)
        own = kernels.lowrank_add(
            y[start:stop].clone(), x[start:stop], LowRankPlan([Segment(0, stop - start, term)])
        )
        assert torch.equal(own, whole[start:stop]), (start, stop)


def test_the_number_of_threads_changes_no_bit(kernels: native.Native) -> None:
    plan = LowRankPlan(
        [Segment(7 * i, 7 * i + 7, term_of(448, 333, 3 * i + 1, i)) for i in range(8)]
    )
    x, y, results = torch.randn(56, 448), torch.randn(56, 333), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(kernels.lowrank_add(y.clone(), x, plan))
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_rows_are_rounded_in_turns(kernels: native.Native) -> None:
    """8,192 columns: 432 rows fill the workspace, the rest comes after."""
    plan = LowRankPlan(
        [Segment(400, 470, term_of(8192, 40, 9)), Segment(480, 500, term_of(8192, 40, 3))]
    )
    x, y = torch.randn(500, 8192), torch.randn(500, 40)
    got = kernels.lowrank_add(y.clone(), x, plan)
    assert torch.allclose(got.double(), right(y, x, plan), rtol=2e-6, atol=2e-5)


def test_the_dispatch_takes_them_with_and_without_the_library(
    library: native.Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    term, x = term_of(64, 40, 8), torch.randn(3, 64)
    results = []
    for own in (library, None):
        monkeypatch.setattr(dispatch, "_native", own)
        results.append(dispatch.lowrank_add(torch.zeros(3, 40), x, [Segment(0, 3, term)]))
    assert (results[0] - results[1]).norm() <= 0.012 * results[1].norm()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a multiple of 64 columns, got 65"):
        RoundedFactor.of_a(torch.randn(4, 65))
    a, b = RoundedFactor.of_a(torch.randn(4, 64)), RoundedFactor.of_b(torch.randn(6, 4))
    with pytest.raises(ValueError, match="both be in 8 bits"):
        LowRank(a, b.dense())
    with pytest.raises(ValueError, match="both be in 8 bits"):
        LowRank(RoundedFactor.of_b(torch.randn(4, 64)), b)
    with pytest.raises(ValueError, match="the same r"):
        LowRank(a, RoundedFactor.of_b(torch.randn(6, 5)))
