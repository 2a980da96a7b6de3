"""Argmax, logsumexp and the largest of a row, against torch: values, ties, NaN, and bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from base import kernels as dispatch
from base.kernels import native
from tests.base.kernels.guarded import one_thread, unaligned

relaxed = settings(max_examples=25)
CHUNK = 8192  # of csrc/reduce.h


@relaxed
@given(rows=st.integers(1, 5), width=st.integers(1, 3 * CHUNK), strength=st.sampled_from([0.1, 30]))
@example(rows=2, width=1, strength=1)
@example(rows=3, width=CHUNK + 1, strength=300)
def test_any_shape(kernels: native.Native, rows: int, width: int, strength: float) -> None:
    logits = unaligned(torch.randn(rows, width) * strength)
    best, log_sum = kernels.steps.greedy(logits)
    assert torch.equal(best, logits.argmax(-1))
    with one_thread():
        right = logits.double().logsumexp(-1)
    assert ((log_sum - right).abs() <= 2e-6 * right.abs() + 2e-6).all()


@relaxed
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf]), min_size=1),
    before=st.sampled_from([0, 7, CHUNK - 3]),
)
@example(values=[-math.inf, -math.inf], before=0)
@example(values=[1.0, math.nan, math.nan], before=CHUNK - 2)
def test_ties_and_what_is_not_finite(
    kernels: native.Native, values: list[float], before: int
) -> None:
    row = torch.cat([torch.full((before,), -5.0), torch.tensor(values)])
    best, log_sum = kernels.steps.greedy(row[None])
    assert best[0] == row.argmax()
    assert torch.allclose(log_sum[0], row.logsumexp(-1), equal_nan=True)
    count = min(len(row), 6)
    found, places = kernels.steps.largest(row, count)
    right, order = row.sort(descending=True, stable=True)
    assert torch.equal(places, order[:count])
    assert torch.equal(found.nan_to_num(), right[:count].nan_to_num())


def test_the_bits_of_a_row_depend_on_that_row_alone(kernels: native.Native) -> None:
    logits = torch.randn(9, 3 * CHUNK + 11) * 5
    whole = kernels.steps.greedy(logits)[1]
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(kernels.steps.greedy(logits)[1], whole)
    for row in range(9):
        assert torch.equal(kernels.steps.greedy(logits[row : row + 1])[1], whole[row : row + 1])
    wide = torch.full((9, 4 * CHUNK), math.nan)
    wide[:, : logits.shape[1]] = logits
    assert torch.equal(kernels.steps.greedy(wide[:, : logits.shape[1]])[1], whole)


@relaxed
@given(width=st.integers(1, 2000), kinds=st.integers(1, 300), count=st.integers(1, 50))
def test_the_largest_are_those_of_a_stable_sort(
    kernels: native.Native, width: int, kinds: int, count: int
) -> None:
    row = unaligned(torch.randint(0, kinds, (width,)).float())
    count = min(count, width)
    found, places = kernels.steps.largest(row, count)
    right, order = row.sort(descending=True, stable=True)
    assert torch.equal(found, right[:count])
    assert torch.equal(places, order[:count])


@pytest.mark.parametrize("served", [True, False])
def test_the_dispatch(
    library: native.Native, monkeypatch: pytest.MonkeyPatch, served: bool
) -> None:
    monkeypatch.setattr(dispatch, "_native", library if served else None)
    logits = torch.randn(3, 500)
    logits[1, 3] = logits[1, 7] = 9
    best, log_sum = dispatch.greedy(logits)
    assert best.tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(log_sum, logits.logsumexp(-1))
    assert dispatch.largest(logits[1], 2)[1].tolist() == [3, 7]
    assert dispatch.largest(logits[0], 0)[1].tolist() == []
    with pytest.raises(ValueError, match="width > 0"):
        dispatch.greedy(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="501 values of a row"):
        dispatch.largest(logits[0], 501)
