"""`base.kernels`: whoever computes, the same answer; what does not fit is refused by all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from base import kernels
from base.kernels import LowRank, NF4Weight, Segment, native, reference


@pytest.fixture(params=["library", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the dispatch on the CPU."""
    library = request.getfixturevalue("library") if request.param == "library" else None
    if library is not None:
        library.select()
    monkeypatch.setattr(kernels, "_native", library)
    return str(request.param)


def test_takes_any_leading_dimensions_and_strides() -> None:
    weight, bias = NF4Weight.quantize(torch.randn(24, 64)), torch.randn(24)
    x = torch.randn(64, 5, 2).permute(2, 1, 0)
    y = kernels.nf4_linear(x, weight, bias)
    assert y.shape == (2, 5, 24)
    assert torch.allclose(y, reference.nf4_linear(x, weight, bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_to_torch(dtype: torch.dtype) -> None:
    weight, x = NF4Weight.quantize(torch.randn(24, 64)), torch.randn(3, 64, dtype=dtype)
    y = kernels.nf4_linear(x, weight)
    assert y.dtype == dtype
    assert torch.equal(y, reference.nf4_linear(x, weight))


def test_the_library_is_what_computes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 on the CPU must not fall back in silence."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("fell back to torch")

    for name in ("nf4_linear", "lowrank_add", "paged_attention"):
        monkeypatch.setattr(reference, name, refuse)
    if backend == "torch":
        with pytest.raises(AssertionError, match="fell back"):
            run_all()
    else:
        run_all()


def run_all() -> None:
    x = torch.randn(3, 64)
    weight = NF4Weight.quantize(torch.randn(8, 64))
    kernels.nf4_linear(x, weight, torch.zeros(8))
    kernels.lowrank_add(torch.zeros(3, 8), x, [Segment(0, 3, LowRank(bias=torch.zeros(8)))])
    heads_first = torch.randn(4, 3, 16).transpose(0, 1)  # as transformers hands it over
    index = torch.tensor([0, 3], dtype=torch.int32)
    cache = torch.randn(2, 4, 2, 16)
    kernels.paged_attention(heads_first, cache, cache, index[None], index, index[1:], 0.25)


def test_gradients_are_those_of_the_dequantised_product() -> None:
    weight = NF4Weight.quantize(torch.randn(2100, 64))  # three tiles of rows in the backward
    grads = []
    for product in (kernels.nf4_linear, reference.nf4_linear):
        torch.manual_seed(1)
        x, bias = torch.randn(2, 3, 64, requires_grad=True), torch.randn(2100, requires_grad=True)
        y = product(x, weight, bias)
        (y * torch.randn(y.shape)).sum().backward()
        assert x.grad is not None
        assert bias.grad is not None
        grads.append((x.grad, bias.grad))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-4, atol=1e-3)
    assert torch.allclose(grads[0][1], grads[1][1])


def test_no_gradient_is_kept_where_none_is_asked() -> None:
    weight = NF4Weight.quantize(torch.randn(8, 64))
    with torch.no_grad():
        assert not kernels.nf4_linear(torch.randn(2, 64, requires_grad=True), weight).requires_grad


def test_lowrank_takes_a_bare_list_and_returns_y() -> None:
    a, b, x = torch.randn(4, 16), torch.randn(6, 4), torch.randn(3, 16)
    y = torch.zeros(3, 6)
    assert kernels.lowrank_add(y, x, [Segment(1, 3, LowRank(a, b))]) is y
    assert torch.allclose(y[1:], x[1:] @ a.t() @ b.t(), atol=1e-4)
    assert not y[0].any()


def test_rows_of_no_sequence_are_zero() -> None:
    cache = torch.randn(1, 4, 1, 8)
    index = torch.tensor([0, 1], dtype=torch.int32)
    out = kernels.paged_attention(
        torch.randn(3, 1, 8), cache, cache, index[None, :1], index, index[1:], 1.0
    )
    assert out[0].any()
    assert not out[1:].any()


def test_refuses_shapes_that_do_not_fit() -> None:
    weight = NF4Weight.quantize(torch.randn(8, 64))
    with pytest.raises(ValueError, match="x has 63 columns, the weight needs 64"):
        kernels.nf4_linear(torch.randn(2, 63), weight)
    with pytest.raises(ValueError, match="bias must be"):
        kernels.nf4_linear(torch.randn(2, 64), weight, torch.zeros(7))
    q, cache = torch.randn(2, 4, 16), torch.randn(2, 4, 2, 16)
    index = torch.tensor([0, 2], dtype=torch.int32)
    good = (q, cache, cache, index[None], index, index[1:])
    kernels.paged_attention(*good, 1.0)
    for place, wrong in (
        (0, torch.randn(2, 3, 16)),
        (0, torch.randn(2, 4, 8)),
        (2, torch.randn(2, 5, 2, 16)),
        (3, index),
        (4, index[:1]),
        (5, index),
    ):
        parts = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises((ValueError, IndexError)):
            kernels.paged_attention(*parts, 1.0)


def test_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    library, status = native.load()
    assert kernels.native_status() == status
    if library is not None:
        assert status.startswith(library.isa)
        monkeypatch.setenv("NIBBLE_ISA", "portable")
        assert native.load()[1] == "portable, as NIBBLE_ISA asks"
