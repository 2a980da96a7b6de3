"""The maps around W: their rows, and what the operator's own tests do not reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adapters.maps import BlockMap, PairMap, Scale, Shift, Sparse
from tests.oracle import relative_error

WIDTH, OUT = 96, 80


def sparse(entries: int) -> Sparse:
    rows = torch.randint(0, OUT, (entries,)).sort().values
    starts = torch.searchsorted(rows, torch.arange(OUT + 1)).int()
    columns = torch.randint(0, WIDTH, (entries,), dtype=torch.int32)
    return Sparse(torch.randn(entries), columns, starts)


torch.manual_seed(0)
MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scale": Scale(torch.randn(WIDTH)),
    "shift": Shift(torch.randn(WIDTH)),
    "sparse": sparse(700),
    "pairs": PairMap(torch.randn(WIDTH), torch.randn(WIDTH), 16),
    "one block for all": BlockMap(torch.randn(1, 8, 8)),
    **{
        f"blocks of {size}": BlockMap(torch.randn(WIDTH // size, size, size), torch.randperm(WIDTH))
        for size in (2, 3, 4, 8, 16, 32, 48, 96)
    },
}


@pytest.mark.parametrize("name", MAPS)
def test_a_row_has_the_same_bits_alone_and_among_others(name: str) -> None:
    x, apply = torch.randn(70, WIDTH), MAPS[name]
    together = apply(x)
    for start, stop in ((0, 1), (3, 5), (5, 8), (8, 20), (20, 69), (69, 70)):
        assert torch.equal(apply(x[start:stop]), together[start:stop])


@pytest.mark.parametrize("name", MAPS)
def test_the_dtype_of_x_is_kept(name: str) -> None:
    x = torch.randn(3, WIDTH)
    half = MAPS[name](x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), MAPS[name](x)) < 2e-2


def test_transposed_blocks_take_the_rows_of_a_matrix() -> None:
    W, x = torch.randn(OUT, WIDTH), torch.randn(5, WIDTH)
    block_map = BlockMap(torch.randn(6, 16, 16), torch.randperm(WIDTH))
    assert relative_error(x @ block_map.transposed(W).t(), block_map(x) @ W.t()) < 1e-6


@pytest.mark.parametrize("span", [(0, OUT), (0, 1), (17, 43), (OUT - 1, OUT), (9, 9)])
def test_rows_of_a_sparse_matrix(span: tuple[int, int]) -> None:
    S = sparse(300)
    whole = S(torch.eye(WIDTH)).t()
    assert torch.equal(S.dense_rows(*span, WIDTH), whole[slice(*span)])
