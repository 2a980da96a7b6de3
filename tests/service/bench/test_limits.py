from __future__ import annotations

from typing import Any

import pytest

from service.bench.limits import Limits, _measure, better, distance
from service.bench.scenario import BASE, DISTINCT, PREFILL, SAME, Scenario

LIMITS = Limits(read_gbytes=10.0, float32_gflops=100.0, int8_gops=400.0)
MACS = (300_000_000, 100_000_000)
FACTS = {
    "step_bytes": 200_000_000,
    "each_adapter_bytes": [10_000_000] * 8,
    "token_bytes": 1000,
    "arithmetic": "int8",
}


def _row(way: str = "engine", gap: float | None = 50.0, first: float = 1000.0) -> dict[str, Any]:
    times = None if gap is None else {"p50": gap, "p99": gap}
    return {"way": way, "inter_token_ms": times, "first_token_ms": {"p50": first, "p99": first}}


def _distance(scenario: Scenario, row: dict[str, Any], **facts: Any) -> dict[str, Any] | None:
    return distance(scenario, row, FACTS | facts, MACS, LIMITS, 64, 32)


def test_one_request_is_bound_by_the_bytes_that_it_reads() -> None:
    found = _distance(BASE, _row())
    assert found is not None
    assert (found["bound_by"], found["took_ms"]) == ("bandwidth", 50.0)
    assert found["least_ms"] == pytest.approx((200_000_000 + 80 * 1000) / 10e9 * 1000, abs=0.01)
    assert found["of_limit"] == pytest.approx(found["least_ms"] / 50, abs=0.001)


def test_an_adapter_is_read_once_however_many_requests_use_it() -> None:
    same, distinct = (_distance(each, _row(), arithmetic="int8") for each in (SAME, DISTINCT))
    assert same is not None
    assert distinct is not None
    assert distinct["least_ms"] - same["least_ms"] == pytest.approx(7.0, abs=0.02)  # 7 × 10 MB


def test_many_rows_are_bound_by_arithmetic_of_the_peers_own_sort() -> None:
    found = _distance(DISTINCT, _row(), arithmetic="float32")
    assert found is not None
    assert (found["bound_by"], found["least_ms"]) == ("arithmetic", 64.0)  # 2 · 8 · 0.4e9 / 100e9


def test_one_after_another_has_one_row_a_step() -> None:
    found = _distance(DISTINCT, _row("set_adapter, one by one"), arithmetic="float32")
    assert found is not None
    assert found["bound_by"] == "bandwidth"


def test_a_prompt_is_bound_by_arithmetic_and_its_head_runs_once() -> None:
    found = _distance(PREFILL, _row(gap=None))
    assert found is not None
    assert found["least_ms"] == pytest.approx(2e3 * (512 * 0.3e9 + 0.1e9) / 400e9, abs=0.01)
    assert found["took_ms"] == 1000.0


def test_nothing_is_said_where_it_is_not_known() -> None:
    assert distance(BASE, _row(), {}, MACS, LIMITS, 64, 32) is None
    assert _distance(BASE, _row(gap=None)) is None
    assert _distance(BASE, _row(gap=0.0)) is None


def test_the_higher_limit_counts() -> None:
    lower = Limits(9.0, 120.0, None)
    assert better(lower, LIMITS) == better(LIMITS, lower) == Limits(10.0, 120.0, 400.0)
    assert better(lower, lower).int8_gops is None
    assert lower.operations("int8") == 120.0


def test_limits_are_measured() -> None:
    found = _measure(1, 0.01)
    assert found.read_gbytes > 0.1
    assert found.float32_gflops > 0.1
