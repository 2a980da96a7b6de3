"""The bench of many registered adapters: its traffic, its measurement, its place in a document."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from service.bench.residency_report import (
    BEGIN,
    END,
    put_between_markers,
    residency_markdown,
)
from service.bench.zipf import Scene, choices, measure, scenes


def scene(base_directory: Path, **fields: Any) -> Scene:
    given: dict[str, Any] = {
        "model": base_directory,
        "registered": 6,
        "resident": 2,
        "requests": 20,
        "clients": 3,
        "prompt_tokens": 4,
        "new_tokens": 2,
        "rank": 2,
        "modules": ("q_proj", "v_proj"),
        "threads": 1,
    }
    return Scene(**{**given, **fields})


def test_adapter_k_is_asked_for_in_proportion_to_one_over_k() -> None:
    found = Counter(choices(100, 200_000, 1.0))
    for k in (2, 5, 10):
        assert found[0] / found[k - 1] == pytest.approx(k, rel=0.1)
    even = Counter(choices(10, 100_000, 0.0))
    assert max(even.values()) / min(even.values()) < 1.1
    assert choices(100, 50, 1.0) == choices(100, 50, 1.0)


def test_the_figures_of_a_small_scene(base_directory: Path, tmp_path: Path) -> None:
    figures = measure(scene(base_directory))
    found = figures["found"]
    assert sum(found.values()) == 20
    assert figures["distinct"] == len(set(choices(6, 20, 1.0))) > 2
    # Room for two: the third one at the latest is not there, and somebody had to leave for it.
    assert figures["cold_loads"] >= figures["distinct"] - 1
    assert figures["evicted"]["slot"] >= figures["cold_loads"] - 2
    assert 0 < figures["hit_rate"] < 1
    assert figures["resident_bytes"] <= figures["budget_bytes"] == 2 * figures["adapter_bytes"]
    assert figures["cost"]["disk_bytes"] >= figures["cost"]["weights_bytes"] > 0
    assert figures["rss_bytes"] > 0
    warm = measure(scene(base_directory, registered=2, warm=True, exponent=0.0))
    assert (warm["hit_rate"], warm["cold_loads"]) == (1.0, 0)

    rows = [{"model": "tiny", **figures}, {"model": "tiny", **warm}]
    text = residency_markdown({"machine": {"cpu": "a processor"}, "rows": rows})
    assert "| 6 |" in text
    assert "mean of 6" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_between_markers(page, text)
    put_between_markers(page, text)
    assert page.read_text() == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"


def test_the_rows_of_one_run(base_directory: Path) -> None:
    rows = scenes(scene(base_directory, resident=32), [1, 64])
    assert [(row.registered, row.warm) for row in rows] == [
        (1, False),
        (64, False),
        (1, True),
        (32, True),
    ]


def test_a_document_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ValueError, match="should have the lines"):
        put_between_markers(page, "text")


def test_layers_that_the_base_has_not_are_named(base_directory: Path) -> None:
    with pytest.raises(ValueError, match=r"has \['down_proj', 'gate_proj'"):
        measure(scene(base_directory, modules=("wqkv",)))
