"""The check before Triton's kernels serve, where `triton_here` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from base import kernels
from base.kernels import LowRank, LowRankPlan, Segment, cuda, reference, triton_check


@pytest.mark.cuda
def test_right_kernels_pass(triton_here: torch.device) -> None:
    assert triton_check.find_fault(triton_here) == ""


@pytest.mark.cuda
def test_a_wrong_kernel_is_named(
    triton_here: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from base.kernels import triton_lowrank

    def idle(y: Tensor, x: Tensor, plan: object) -> Tensor:
        return y

    monkeypatch.setattr(triton_lowrank, "lowrank_add", idle)
    assert triton_check.find_fault(triton_here).startswith("lowrank_add is off by")


@pytest.mark.cuda
def test_a_kernel_that_does_not_run_is_no_end_of_the_server(
    triton_here: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from base.kernels import triton_attention

    def refuse(*arguments: object) -> Tensor:
        raise RuntimeError("PTXAS error")

    monkeypatch.setattr(triton_attention, "paged_attention", refuse)
    assert "RuntimeError: PTXAS error" in triton_check.find_fault(triton_here)


@pytest.mark.cuda
def test_the_dispatch_hands_over(
    triton_here: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would do for tensors on a GPU, here for those on the device that there is."""
    from base.kernels import triton_attention, triton_lowrank

    calls: list[str] = []
    for module, name in ((triton_lowrank, "lowrank_add"), (triton_attention, "paged_attention")):
        inner = getattr(module, name)

        def counted(*operands: object, inner: Any = inner, name: str = name) -> Tensor:
            calls.append(name)
            return inner(*operands)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(kernels, "_native", None)
    for name in ("takes_lowrank", "takes_attention"):
        monkeypatch.setattr(cuda, name, lambda *operands: True)
    term = LowRank(bias=torch.ones(3, device=triton_here))
    y, x = torch.zeros(2, 3, device=triton_here), torch.zeros(2, 4, device=triton_here)
    assert kernels.lowrank_add(y, x, [Segment(1, 2, term)]).tolist() == [[0] * 3, [1] * 3]
    q, cache = torch.randn(1, 2, 8).to(triton_here), torch.randn(1, 4, 1, 8).to(triton_here)
    index = [torch.tensor(n, dtype=torch.int32, device=triton_here) for n in ([[0]], [0, 1], [3])]
    attended = kernels.paged_attention(q, cache, cache, *index, 0.3, 2, 5.0)
    torch.testing.assert_close(
        attended, reference.paged_attention(q, cache, cache, *index, 0.3, 2, 5.0)
    )
    assert calls == ["lowrank_add", "paged_attention"]


def test_nothing_on_the_cpu_asks_for_triton() -> None:
    y = torch.zeros(2, 3)
    assert not cuda.takes_lowrank(y, y, LowRankPlan([]))
    assert not cuda.takes_attention(y, y, y)


def test_without_triton_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "find_spec", lambda name: None)
    assert not triton_check.serve_on.__wrapped__(torch.device("cpu"))
