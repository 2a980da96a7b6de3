"""Low-rank terms in 8 bits, by an oracle that rounds alike; and what the rounding costs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from base import kernels as dispatch
from base.kernels import (
    LowRank,
    LowRankPlan,
    NF4Weight,
    PanelWeight,
    RoundedFactor,
    Segment,
    native,
    reference,
)
from tests.base.kernels.guarded import Guarded, one_thread, unaligned

relaxed = settings(max_examples=15)


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
def right(y: Tensor, x: Tensor, plan: LowRankPlan) -> tuple[Tensor, Tensor]:
    """In float64, with x and A x rounded where a term reads them rounded; and how far an output
    may be off where a number of A x lies between two steps: one step, of any of its ranks."""
    y, step = y.double(), torch.zeros(y.shape, dtype=torch.float64)
    for segment in plan.segments:
        term, rows = segment.term, slice(segment.start, segment.stop)
        if segment.start == segment.stop:
            continue
        if not term.rounded:
            y = reference.lowrank_add(y, x.double(), LowRankPlan([segment]))
            continue
        a, b = (matrix.double() for matrix in term.matrices() or ())
        assert isinstance(term.b, RoundedFactor)
        assert term.b.columns is not None
        columns = term.b.columns.double()
        inner = reference.rounded_rows(x)[rows] @ a.t()
        inner = inner * columns if term.d is None else inner * columns * term.d
        padded = functional.pad(inner, (0, -term.rank % 64))
        b = functional.pad(torch.where(columns > 0, b / columns, 0), (0, -term.rank % 64))
        y[rows] += reference.rounded_rows(padded) @ b.t()
        steps = padded.view(len(padded), -1, 64).abs().amax(-1) / 127
        step[rows] += steps @ b.abs().view(len(b), -1, 64).amax(-1).t()
        gain = torch.ones(y.shape[1]) if term.gain is None else term.gain
        y[rows] = gain * y[rows] + (0 if term.bias is None else term.bias.double())
        step[rows] *= gain.abs()
    return y, step


def assert_right(got: Tensor, y: Tensor, x: Tensor, plan: LowRankPlan) -> None:
    wanted, step = right(y, x, plan)
    off, exact = (got.double() - wanted).abs(), 2e-5 + 2e-6 * wanted.abs()
    assert (off <= exact + step).all()
    # A number of A x between two steps moves its row: a few in a hundred thousand numbers are.
    moved = (off > exact).any(1).sum()
    assert moved <= max(1, len(got) // 20)


@pytest.mark.parametrize(("rank", "width", "out"), [(1, 64, 1), (8, 128, 32), (70, 192, 70)])
def test_a_number_is_at_most_half_a_step_off(rank: int, width: int, out: int) -> None:
    a, b = torch.randn(rank, width), torch.randn(out, rank)
    a[0], b[:, 0] = 0, 1e-42
    b[:, 1:] *= torch.logspace(-3, 3, rank)[1:]
    kept_a, kept_b = RoundedFactor.of_a(a), RoundedFactor.of_b(b)
    assert kept_a.dense().shape == a.shape
    assert kept_b.dense().shape == b.shape
    steps_a = a.view(rank, -1, 64).abs().amax(-1, keepdim=True).expand(-1, -1, 64) / 254
    assert ((kept_a.dense() - a).abs() <= steps_a.reshape(a.shape) * 1.001).all()
    columns = b.abs().amax(0)
    steps_b = (b / columns)[:, 1:].abs().amax(1, keepdim=True) * (1.001 / 252) if rank > 1 else 0
    assert ((kept_b.dense() - b).abs() <= steps_b * columns + 1e-41).all()
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
    assert_right(y.inside, before, x, plan)


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 31])
def test_in_the_call_of_their_products_the_bits_are_those_of_calls_of_their_own(
    kernels: native.Native, rows: int, bits: int
) -> None:
    """Two products of one x, the second without terms of the first's kind, on 1 to 4 threads."""
    width, outs = 128, (150, 64)
    dense = [torch.randn(out, width) for out in outs]
    if bits == 4:
        weights = [PanelWeight.pack(NF4Weight.quantize(one, False)) for one in dense]
    else:
        weights = [PanelWeight.quantize8(one) for one in dense]
    biases = [torch.randn(outs[0]), None]
    cuts = sorted({0, rows // 3, rows // 2, rows})
    plans = [
        LowRankPlan(
            [
                *(Segment(a, b, term_of(width, out, 5 * a % 19, a % 8)) for a, b in pairwise(cuts)),
                Segment(rows // 2, rows, term_of(width, out, 9, 6)),
            ]
        )
        for out in outs
    ]
    x = torch.randn(rows, width)
    wanted = [y.clone() for y in kernels.fast_linears(x, weights, biases)]
    for y, plan in zip(wanted, plans, strict=True):
        kernels.lowrank_add(y, x, plan)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        ys = [Guarded(rows, out) for out in outs]
        kernels.fast_linears(x, weights, biases, [y.inside for y in ys], plans)
        for found, own in zip(ys, wanted, strict=True):
            found.check()
            assert torch.equal(found.inside, own)


def test_many_rows_are_rounded_in_turns(kernels: native.Native) -> None:
    """8,192 columns: some hundred rows fill the workspace, the rest comes after."""
    plan = LowRankPlan(
        [Segment(400, 470, term_of(8192, 40, 9)), Segment(480, 500, term_of(8192, 40, 3))]
    )
    x, y = torch.randn(500, 8192), torch.randn(500, 40)
    assert_right(kernels.lowrank_add(y.clone(), x, plan), y, x, plan)


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
