"""The fast precision on the embedded base: the bound that its default rests on."""

import pytest

from base.kernels import fast_status
from base.mini import MINI
from base.mini.evaluate import Size
from base.mini.precision import BOUND, Movement, compare


def test_a_figure_beyond_the_bound_is_told() -> None:
    same = {"loss": {"story": 1.0}, "tasks": {"all": 0.8}, "context": {"all": 0.9}}
    assert Movement(same, same, {}).within_bound
    for group, value in (("loss", 1.006), ("tasks", 0.794), ("context", 0.906)):
        moved = {name: dict(rows) for name, rows in same.items()}
        row = next(iter(moved[group]))
        moved[group][row] = value
        assert not Movement(same, moved, {}).within_bound


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_embedded_base_stays_within_the_bound() -> None:
    if fast_status().startswith("exact"):
        pytest.skip(fast_status())
    moved = compare(MINI, Size(8, 8, 8))
    assert abs(moved.summary["perplexity"]) < BOUND
    # So few items say little about shares: two of them may change.
    assert abs(moved.summary["context"]) <= 2 / 48
    assert abs(moved.summary["tasks"]) <= 2 / 176
    assert 0.001 < max(moved.layers.values()) < 0.02
