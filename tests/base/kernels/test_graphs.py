"""torch's CUDA graphs as our recorder uses them, on a GPU; what is staged for them, anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from base.kernels import LowRank, LowRankPlan, Segment, SlotPlan, SlotTable, Staged, recorder_for
from base.kernels import lowrank_add as add

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_there_is_no_recorder_for_a_cpu() -> None:
    assert recorder_for(torch.device("cpu")) is None


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, on_a_gpu])])
def test_what_is_sent_arrives_and_no_more(where: str) -> None:
    staged = Staged(4, torch.int32, torch.device(where))
    address = staged.there.data_ptr()
    staged.writable()[:] = torch.tensor([1, 2, 3, 4])
    staged.send(2)
    staged.writable()[:] = torch.tensor([5, 6, 7, 8])  # the first copy has its own numbers
    assert staged.there.tolist() == [1, 2, 0, 0]
    staged.send()
    assert staged.there.tolist() == [5, 6, 7, 8]
    assert staged.there.data_ptr() == address


@pytest.mark.cuda
@on_a_gpu
def test_a_replay_reads_what_the_tensors_hold_then() -> None:
    recorder = recorder_for(torch.device("cuda"))
    assert recorder is not None, "Triton's kernels do not serve here: the log says why"
    x = torch.ones(3, device="cuda")
    made, replay = recorder.record(lambda: x.cumsum(0) * 2)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    replay()
    assert made.tolist() == [2.0, 6.0, 12.0]


@pytest.mark.cuda
@on_a_gpu
def test_what_waits_is_refused_and_the_device_goes_on() -> None:
    recorder = recorder_for(torch.device("cuda"))
    assert recorder is not None
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x * x.sum().item())
    made, replay = recorder.record(lambda: x + 1)
    replay()
    assert made.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.cuda
@on_a_gpu
def test_a_captured_product_takes_the_adapters_that_are_in_the_table_then() -> None:
    device = torch.device("cuda")
    recorder = recorder_for(device)
    assert recorder is not None
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    terms = [LowRank(draw(r, 2048) / 45, draw(96, r)) for r in (16, 5)]
    table = SlotTable(2, 1, device)
    tiles = torch.zeros(4, 3, dtype=torch.int32, device=device)
    x, y = draw(4, 2048), draw(4, 96)
    plan = SlotPlan(table, 0, tiles)
    made, replay = recorder.record(lambda: add(y.clone(), x, plan))
    for first, second in ((0, 1), (1, 0)):
        table.put(0, {0: terms[first]})
        table.put(1, {0: terms[second]})
        tiles[:2] = torch.tensor([[0, 3, 0], [3, 4, 1]])
        replay()
        segments = [Segment(0, 3, terms[first]), Segment(3, 4, terms[second])]
        assert torch.equal(made, add(y.clone(), x, LowRankPlan(segments)))
