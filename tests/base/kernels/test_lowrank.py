import pytest
import torch

from base.kernels import LowRank, LowRankPlan, Segment


def term(rank: int = 4, width: int = 6, out: int = 5) -> LowRank:
    return LowRank(torch.randn(rank, width), torch.randn(out, rank))


def test_b_is_turned_once_and_reads_the_same() -> None:
    b = torch.randn(5, 4)
    kept = LowRank(torch.randn(4, 6), b).b
    assert kept is not None
    assert torch.equal(kept, b)
    assert kept.t().is_contiguous()


@pytest.mark.parametrize(
    "parts",
    [
        {"a": torch.zeros(4, 6)},
        {"a": torch.zeros(4, 6), "b": torch.zeros(5, 3)},
        {"a": torch.zeros(4, 6).half(), "b": torch.zeros(5, 4).half()},
        {"a": torch.zeros(4, 6), "b": torch.zeros(5, 4), "d": torch.zeros(5)},
        {"a": torch.zeros(4, 6), "b": torch.zeros(5, 4), "gain": torch.zeros(4)},
        {"gain": torch.zeros(5), "bias": torch.zeros(6)},
        {"gain": torch.zeros(5).bfloat16()},
    ],
)
def test_refuses_parts_that_do_not_fit(parts: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs both"):
        LowRank(**parts)


def test_a_plan_refuses_layers_of_other_widths() -> None:
    with pytest.raises(ValueError, match="in_features"):
        LowRankPlan([Segment(0, 1, term()), Segment(1, 2, term(width=7))])
    with pytest.raises(ValueError, match="start <= stop"):
        LowRankPlan([Segment(2, 1, term())])


def test_a_plan_refuses_tensors_it_was_not_made_for() -> None:
    plan = LowRankPlan([Segment(1, 3, term())])
    plan.check(torch.zeros(3, 5), torch.zeros(3, 6))
    for y, x in (((2, 5), (2, 6)), ((3, 4), (3, 6)), ((3, 5), (3, 7)), ((3, 5), (4, 6))):
        with pytest.raises(ValueError, match=r"must be|columns|segment ends"):
            plan.check(torch.zeros(y), torch.zeros(x))


def test_counts_bytes_and_workspace() -> None:
    low = term()
    assert low.nbytes == 4 * (4 * 6 + 5 * 4)
    plan = LowRankPlan([Segment(0, 3, low), Segment(3, 5, LowRank(bias=torch.zeros(5)))])
    assert (plan.workspace, plan.rows, plan.in_features, plan.out_features) == (12, 5, 6, 5)
