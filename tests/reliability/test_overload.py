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
        full, over, cost = measure(served, 128, 8)
    assert wrong_with(full, over) == []
    assert len(over.times(503)) > 2 * len(over.times(200))
    assert cost < 0.01, "a refusal costs too much"
    # On a machine of two cores, shared with whatever runs beside the tests.
    assert quantile(over.times(200), 0.5) < 3 * quantile(full.times(200), 0.99)
