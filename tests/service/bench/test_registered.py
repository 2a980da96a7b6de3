from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters.store import AdapterStore
from service.bench import registered
from service.bench.growth import Asked
from service.bench.registered import Setting, measure


def _setting(base: Path) -> Setting:
    return Setting(
        base,
        "exact",
        threads=1,
        rounds=1,
        rank=2,
        counts=(1, 4),
        growth_rounds=1,
        resident=2,
        clients=2,
        zipf_requests=8,
    )


def test_the_figures_of_a_few(base_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests: list[dict[str, str]] = []

    def growth(
        model: Path, homes: Sequence[tuple[int, Path]], *rest: Any
    ) -> list[dict[str, object]]:
        for _, home in homes:  # as `nibble serve --home` finds them
            with closing(AdapterStore(f"{home}/blobs", f"{home}/catalog.db")) as store:
                digests.append({one.name: one.digest for one in store.list()})
        assert rest[2].adapter == "many-0"
        return [{"registered": count} for count, _ in homes]

    monkeypatch.setattr(registered, "measure_growth", growth)
    figures = measure(_setting(base_directory))
    assert [row["registered"] for row in figures["growth"]] == [1, 4, 1]
    assert [len(found) for found in digests] == [1, 4, 1]
    assert len({found["many-0"] for found in digests}) == 1
    assert figures["resident"]["many_tokens_per_second"] > 0
    assert (figures["zipf"]["registered"], figures["zipf"]["requests"]) == (4, 8)
    assert 0 < figures["zipf"]["distinct"] <= 4


@pytest.mark.slow
def test_servers_are_asked_in_turns(base_directory: Path) -> None:
    rows = measure(_setting(base_directory))["growth"]
    assert [row["registered"] for row in rows] == [1, 4, 1]
    assert rows[0]["ratio"] == rows[0]["cpu"]["ratio"] == 1.0
    assert all(row["token_ms"] > 0 < row["cpu_ms"] for row in rows)
    assert Asked("many-0", 100, 2, 16, 16).tokens == 32
