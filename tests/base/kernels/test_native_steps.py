"""What stands between the NF4 products: against torch and transformers, and by bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from base.kernels import native
from base.kernels.steps import GELU_TANH, SILU
from tests.base.kernels.guarded import Guarded, one_thread, unaligned

relaxed = settings(max_examples=20)
FLOATS = (torch.float32, torch.bfloat16)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-6) -> None:
    scale = float(want.double().abs().max()) + 1e-30
    assert float((got.double() - want.double()).abs().max()) <= tolerance * scale


@relaxed
@given(
    width=st.integers(1, 150),
    out=st.integers(1, 70),
    rows=st.integers(1, 40),
    stored=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
)
def test_dense_product_of_any_shape(
    kernels: native.Native, width: int, out: int, rows: int, stored: torch.dtype, with_bias: bool
) -> None:
    x, weight = unaligned(torch.randn(rows, width)), torch.randn(out, width).to(stored)
    bias = unaligned(torch.randn(out)) if with_bias else None
    y = Guarded(rows, out)
    kernels.steps.dense_linear(x, weight, bias, y.inside)
    y.check()
    with one_thread():
        wanted = functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
    # Against the sum of absolute values: a sum that cancels keeps the rounding of its terms.
    terms = functional.linear(x.double().abs(), weight.double().abs())
    assert float((y.inside.double() - wanted).abs().max()) <= 1e-6 * float(terms.max() + 1)


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("width", [64, 100])
def test_a_row_of_a_dense_product_has_its_own_bits(
    kernels: native.Native, stored: torch.dtype, width: int
) -> None:
    x, weight, bias = torch.randn(40, width), torch.randn(500, width).to(stored), torch.randn(500)
    alone = torch.cat([kernels.steps.dense_linear(row[None], weight, bias) for row in x])
    for rows in (2, 5, 6, 7, 13, 40):
        for threads in (1, 3, 4):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.steps.dense_linear(x[:rows], weight, bias), alone[:rows])


@relaxed
@given(width=st.integers(1, 200), rows=st.integers(1, 12), residual=st.booleans())
def test_norm_is_transformers_norm(
    kernels: native.Native, width: int, rows: int, residual: bool
) -> None:
    for theirs, shift in ((Qwen2RMSNorm(width, 1e-6), 0.0), (GemmaRMSNorm(width, 1e-6), 1.0)):
        theirs.weight.data = torch.randn(width)
        x = unaligned(torch.randn(rows, width))
        add = unaligned(torch.randn(rows, width)) if residual else None
        y, total = Guarded(rows, width), Guarded(rows, width)
        kernels.steps.rms_norm(
            x, theirs.weight.data, 1e-6, shift, add=add, total=total.inside, y=y.inside
        )
        y.check()
        summed = x if add is None else x + add
        close(y.inside, theirs.double()(summed.double()).detach(), 2e-6)
        if add is not None:
            total.check()
            assert torch.equal(total.inside, summed)


def test_tokens_can_have_a_norm_of_their_own(kernels: native.Native) -> None:
    x, base = torch.randn(12, 20), torch.randn(20)
    own = [(1, 2, torch.randn(20)), (3, 4, torch.randn(20))]  # of tokens: each has 3 rows
    y = kernels.steps.rms_norm(x, base, 1e-6, own=own, each=3)
    for token in range(4):
        weight = {start: w for start, _, w in own}.get(token, base)
        rows = slice(3 * token, 3 * token + 3)
        assert torch.equal(y[rows], kernels.steps.rms_norm(x[rows].contiguous(), weight, 1e-6))


@relaxed
@given(half=st.integers(1, 40), heads=st.integers(1, 5), tokens=st.integers(1, 9))
def test_rotary_gives_the_bits_of_transformers(
    kernels: native.Native, half: int, heads: int, tokens: int
) -> None:
    x = unaligned(torch.randn(tokens, heads, 2 * half))
    cos, sin = torch.randn(tokens, 2 * half), torch.randn(tokens, 2 * half)
    turned = x.transpose(0, 1)[None]
    wanted, _ = apply_rotary_pos_emb(turned, turned, cos[None], sin[None])
    assert torch.equal(kernels.steps.rotary(x, cos, sin), wanted[0].transpose(0, 1))


@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
def test_gates_are_torchs(kernels: native.Native, kind: int) -> None:
    gate = torch.cat((torch.linspace(-90, 90, 4001), torch.randn(3000), torch.tensor([0.0, 1e-30])))
    up = torch.randn(len(gate))
    act = (lambda x: functional.gelu(x, approximate="tanh")) if kind else functional.silu
    wanted = act(gate.double()) * up.double()
    got = kernels.steps.gated(kind, gate.clone(), up)
    error = (got.double() - wanted).abs() / wanted.abs().clamp(min=1e-3)
    assert float(error.max()) < 2e-6


def test_softcap_and_sum(kernels: native.Native) -> None:
    x, y = 40 * torch.randn(1003), torch.randn(1003)
    assert torch.equal(kernels.steps.add(x.clone(), y), x + y)
    close(kernels.steps.softcap(x.clone(), 30.0), 30 * torch.tanh(x.double() / 30), 1e-6)


def test_a_value_has_its_own_bits(kernels: native.Native) -> None:
    """Wherever it stands, the last ones of an odd length too, and on any number of threads."""
    gate, up = torch.randn(70_001), torch.randn(70_001)
    for kind in (SILU, GELU_TANH):
        torch.set_num_threads(1)
        whole = kernels.steps.gated(kind, gate.clone(), up)
        for start, stop in ((0, 5), (3, 70_001), (69_990, 70_001), (17, 18)):
            for threads in (1, 4):
                torch.set_num_threads(threads)
                part = kernels.steps.gated(kind, gate[start:stop].clone(), up[start:stop].clone())
                assert torch.equal(part, whole[start:stop])


def test_a_norm_of_any_rows_has_its_own_bits(kernels: native.Native) -> None:
    x, weight = torch.randn(300, 203), torch.randn(203)
    torch.set_num_threads(1)
    alone = torch.cat([kernels.steps.rms_norm(row[None], weight, 1e-5) for row in x])
    torch.set_num_threads(4)
    assert torch.equal(kernels.steps.rms_norm(x, weight, 1e-5), alone)


def test_what_is_not_finite_stays_so(kernels: native.Native) -> None:
    x = torch.full((1, 20), float("nan"))
    assert kernels.steps.rms_norm(x, torch.ones(20), 1e-6).isnan().all()
    assert kernels.steps.gated(SILU, x.clone(), torch.ones(1, 20)).isnan().all()
    assert kernels.steps.gated(GELU_TANH, x.clone(), torch.ones(1, 20)).isnan().all()
