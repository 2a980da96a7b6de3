"""Terms by slot and rows by tile, against the plan of the same rows, where `triton_here` says."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from base import kernels
from base.kernels import LowRank, LowRankPlan, Segment, SlotPlan, SlotTable
from tests.base.kernels.test_triton_lowrank import term

WIDTH, OUT, ROWS, PLACE = 1100, 70, 12, 1  # the width is split


def tables(draw: random.Random, device: torch.device) -> tuple[SlotTable, dict[int, LowRank]]:
    """A table of five slots and two places, and what PLACE has in it: slot 4 has nothing."""
    terms = {slot: term(draw, rank, WIDTH, OUT, device) for slot, rank in enumerate((8, 0, 21, 70))}
    table = SlotTable(5, 2, device)
    for slot, own in terms.items():
        table.put(slot, {0: LowRank(bias=torch.full((OUT,), torch.nan).to(device)), PLACE: own})
    return table, terms


def tiles_of(rows: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    """As many tiles as a step of ROWS rows may have; those beyond are nobody's."""
    padded = rows + [(0, 0, 0)] * (ROWS - len(rows))
    return torch.tensor(padded, dtype=torch.int32, device=device)


MIX = [(0, 2, 2), (3, 4, 0), (4, 9, 3), (9, 10, 1), (10, 11, 4)]


@pytest.mark.cuda
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_bits_are_those_of_the_plan(triton_here: torch.device, dtype: torch.dtype) -> None:
    from base.kernels import triton_lowrank

    torch.manual_seed(0)
    table, terms = tables(random.Random(0), triton_here)
    x = torch.randn(ROWS, WIDTH, device=triton_here).to(dtype)
    y = torch.randn(ROWS, OUT, device=triton_here).to(dtype)
    plan = LowRankPlan([Segment(a, b, terms[slot]) for a, b, slot in MIX if slot in terms])
    wanted = triton_lowrank.lowrank_add(y.clone(), x, plan)
    found = triton_lowrank.slots_add(
        y.clone(), x, SlotPlan(table, PLACE, tiles_of(MIX, triton_here))
    )
    assert torch.equal(found, wanted)
    untouched = [2, 10, 11]  # nobody's, of a slot without terms, nobody's
    assert torch.equal(found[untouched], y[untouched])
    assert not torch.equal(found, y)


@pytest.mark.cuda
def test_a_slot_can_be_given_away(triton_here: torch.device) -> None:
    """The same plan, that is the arguments of a captured launch, does what the tables say then."""
    from base.kernels import triton_lowrank

    torch.manual_seed(1)
    table, terms = tables(random.Random(1), triton_here)
    plan = SlotPlan(table, PLACE, tiles_of([(0, 1, 0)], triton_here))
    x = torch.randn(ROWS, WIDTH, device=triton_here)
    zeros = torch.zeros(ROWS, OUT, device=triton_here)
    table.put(0, {PLACE: terms[3]})
    found = triton_lowrank.slots_add(zeros.clone(), x, plan)
    wanted = triton_lowrank.lowrank_add(zeros.clone(), x, LowRankPlan([Segment(0, 1, terms[3])]))
    assert torch.equal(found, wanted)
    plan.tiles.copy_(tiles_of([(5, 6, 0)], triton_here))
    table.clear(0)
    assert torch.equal(triton_lowrank.slots_add(zeros.clone(), x, plan), zeros)


def test_on_the_cpu_the_tables_say_the_same() -> None:
    torch.manual_seed(2)
    table, terms = tables(random.Random(2), torch.device("cpu"))
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUT)
    plan = LowRankPlan([Segment(a, b, terms[slot]) for a, b, slot in MIX if slot in terms])
    slots = SlotPlan(table, PLACE, tiles_of(MIX, torch.device("cpu")))
    wanted = kernels.lowrank_add(y.clone(), x, plan)
    assert torch.equal(kernels.lowrank_add(y.clone(), x, slots), wanted)
    assert not torch.equal(wanted, y)
