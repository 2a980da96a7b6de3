"""Triton's shrink and expand against float64, where `triton_here` says."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from base.kernels import LowRank, LowRankPlan, Segment

pytestmark = pytest.mark.cuda

SLOW = pytest.mark.slow  # in the interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def term(draw: random.Random, rank: int, width: int, out: int, device: torch.device) -> LowRank:
    """A term of which each part but `a` and `b` may be missing; rank 0 is a scale and a bias."""

    def vector(size: int) -> Tensor | None:
        return torch.randn(size, device=device) if draw.random() < 0.6 else None

    stored = draw.choice((torch.float32, torch.bfloat16))
    if not rank:
        return LowRank(gain=vector(out), bias=vector(out))
    a = (torch.randn(rank, width, device=device) / width**0.5).to(stored)
    b = (torch.randn(out, rank, device=device) / rank**0.5).to(stored)
    return LowRank(a, b, vector(rank), vector(out), vector(out))


def exact(y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
    """The operator in float64, segment after segment."""
    y = y.double().clone()
    for s in plan.segments:
        part = y[s.start : s.stop]
        if s.term.a is not None and s.term.b is not None:
            inner = x[s.start : s.stop].double() @ s.term.a.double().t()
            inner = inner if s.term.d is None else inner * s.term.d.double()
            part = part + inner @ s.term.b.double().t()
        part = part if s.term.gain is None else part * s.term.gain.double()
        y[s.start : s.stop] = part if s.term.bias is None else part + s.term.bias.double()
    return y


def add(y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
    from base.kernels.triton_lowrank import lowrank_add

    plan.check(y, x)
    return lowrank_add(y, x, plan)


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=SLOW) for n in range(3, 9))])
def test_mixed_segments_against_float64(triton_here: torch.device, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    width = draw.choice((7, 64, 130)) if seed else 1100  # the first is split
    out = draw.choice((5, 64, 97))
    spans = [draw.choice((0, 1, 1, 3, 18)) for _ in range(4 if seed else 2)]
    segments, row = [], draw.randrange(3)
    for length in spans:
        rank = draw.choice((0, 1, 8, 16, 21))
        made = term(draw, rank, width, out, triton_here)
        segments.append(Segment(row, row + length, made))
        row += length + draw.randrange(2)
    rows = row + draw.randrange(3)
    y = torch.randn(rows, out, device=triton_here).to(dtype)
    x = torch.randn(rows, width, device=triton_here).to(dtype)
    plan = LowRankPlan(segments)
    wanted = exact(y, x, plan)
    untouched = torch.ones(rows, dtype=torch.bool, device=triton_here)
    for s in segments:
        untouched[s.start : s.stop] = False
    before = y.clone()
    assert add(y, x, plan) is y
    error = (y.double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 5e-4}[dtype]
    assert torch.equal(y[untouched], before[untouched])


def test_terms_that_share_rows_run_in_order(triton_here: torch.device) -> None:
    torch.manual_seed(1)
    draw = random.Random(1)
    first, second = (term(draw, rank, 40, 24, triton_here) for rank in (4, 9))
    last = LowRank(gain=torch.randn(24, device=triton_here), bias=torch.ones(24).to(triton_here))
    plan = LowRankPlan([Segment(0, 3, first), Segment(2, 6, second), Segment(1, 5, last)])
    y, x = torch.randn(6, 24, device=triton_here), torch.randn(6, 40, device=triton_here)
    wanted = exact(y, x, plan)
    add(y, x, plan)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_that_are_strided_and_a_plan_used_twice(triton_here: torch.device) -> None:
    torch.manual_seed(2)
    plan = LowRankPlan([Segment(1, 4, term(random.Random(2), 5, 33, 20, triton_here))])
    wide = torch.randn(4, 50, device=triton_here)
    for x in (wide[:, 7:40], torch.randn(33, 4, device=triton_here).t()):
        whole = torch.randn(4, 31, device=triton_here)
        y, beside = whole[:, :20], whole[:, 20:].clone()
        wanted = exact(y, x, plan)
        add(y, x, plan)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(whole[:, 20:], beside)


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=SLOW) for d in DTYPES[1:])])
def test_a_row_does_not_depend_on_its_batch(triton_here: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    draw = random.Random(3)
    own, other = term(draw, 12, 90, 48, triton_here), term(draw, 30, 90, 48, triton_here)
    x = torch.randn(20, 90, device=triton_here).to(dtype)
    y = torch.randn(20, 48, device=triton_here).to(dtype)
    alone = add(y[7:8].clone(), x[7:8], LowRankPlan([Segment(0, 1, own)]))
    for segments in (
        [Segment(0, 20, own)],
        [Segment(0, 7, other), Segment(7, 9, own), Segment(9, 20, other)],
    ):
        mixed = add(y.clone(), x, LowRankPlan(segments))
        assert torch.equal(mixed[7:8], alone)


def test_no_segment_leaves_y(triton_here: torch.device) -> None:
    y, x = torch.randn(2, 3, device=triton_here), torch.randn(2, 4, device=triton_here)
    for segments in ([], [Segment(0, 2, LowRank())], [Segment(1, 1, LowRank(bias=torch.ones(3)))]):
        assert torch.equal(add(y.clone(), x, LowRankPlan(segments)), y)
