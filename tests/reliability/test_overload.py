"""More requests than a server can serve. The short forms are in tests/service/test_admission.py and
test_generate.py: a bound, and a refusal before a body is read; this is overload.py itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracle import make_base
from tests.reliability.clients import quantile
from tests.reliability.overload import FLAGS, measure, wrong_with
from tests.reliability.served import serving


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_times_its_load(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    with serving(tmp_path / "run", "--base", str(base), *FLAGS) as served:
        measure(served, 8, 2)
        rounds = [measure(served, 128, 4) for _ in range(4)]
    for full, over, _ in rounds:
        assert wrong_with(full, over) == []
        assert len(over.times(503)) > 2 * len(over.times(200))
    assert min(cost for *_, cost in rounds) < 0.005, "a refusal costs too much"
    # What else runs here takes its time in one round or another; refusals would in all of them.
    ratios = [
        quantile(over.times(200), 0.5) / quantile(full.times(200), 0.99) for full, over, _ in rounds
    ]
    assert min(ratios) < 2, ratios
