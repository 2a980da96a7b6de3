from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from base.kernels import bench_page
from service.bench.chart import bar_chart
from service.bench.performance import write_page

SVG = "{http://www.w3.org/2000/svg}"


def _result(scenario: str, peer: str, rate: float, counts: str = "output") -> dict[str, Any]:
    times = {"p50": 12.5, "p99": 20.0}
    return {
        "scenario": scenario,
        "peer": peer,
        "way": "engine",
        "counts": counts,
        "tokens_per_second": rate,
        "tokens_per_second_rounds": [rate],
        "rounds": 1,
        "first_token_ms": times,
        "inter_token_ms": None if counts == "prompt" else times,
        "limit": {"bound_by": "bandwidth", "of_limit": 0.75},
    }


@pytest.fixture
def figures() -> dict[str, Any]:
    ratio = {"ratio": 3.5, "lowest": 3.0, "highest": 4.0}
    return {
        "model": "qwen2-0.4b",
        "prompt_tokens": 64,
        "new_tokens": 32,
        "threads": 2,
        "isa": "",
        "side_by_side": True,
        "lora_rank": 16,
        "command": "nibble bench --suite full --cache /a/b --json /c/d.json --llama",
        "date": "2026-01-02",
        "machine": {
            "cpu": "A CPU & more",
            "features": ("avx2",),
            "cores": 2,
            "memory_total": 8 << 30,
            "versions": {"torch": "9.9"},
        },
        "limits": {"read_gbytes": 20.0, "float32_gflops": 100.0, "int8_gops": None},
        "results": [
            _result("1 base", "nibble fast", 60.0),
            _result("1 base", "peft", 3.0),
            _result("prefill 512", "nibble fast", 400.0, "prompt"),
        ],
        "ratios": [{"scenario": "1 base", "peer": "nibble fast", "over": "peft: engine", **ratio}],
        "targets": [
            {"what": "prefill", "target": "≥ 0.9", "over": "llama.cpp", "reached": True, **ratio},
            {"what": "8 distinct", "target": "≥ 3", "over": "x", "reached": None, "ratio": None},
        ],
        "registered": {
            "growth": [
                {"registered": 1000, "token_ms": 12.5, "cpu_ms": 20.1, "rounds": 9, **ratio}
                | {"cpu": {"ratio": 1.5, "lowest": 1.0, "highest": 2.0}}
            ],
            "resident": {
                "adapters": 32,
                "rank": 16,
                "one_tokens_per_second": 80.0,
                "many_tokens_per_second": 70.0,
                **ratio,
            },
            "zipf": {
                "registered": 1000,
                "resident": 32,
                "requests": 160,
                "distinct": 55,
                "hit_rate": 0.815,
                "tokens_per_second": 33.3,
                "cold_load_ms": None,
                "first_token_ms": {"p50": 1.0, "p99": 2.0},
            },
        },
        "starts": [
            {
                "model": "mini",
                "precision": "fast",
                "first_seconds": 9.9,
                "second_seconds": 3.5,
                "second_seconds_all": [3.4, 3.5, 3.6],
                "first_peak_bytes": 400 << 20,
                "rss_bytes": 300 << 20,
                "import_torch_seconds": 1.7,
                "budget_bytes": 500 << 20,
            }
        ],
        "own_ratios": [{"what": "DoRA / LoRA", "peer": "nibble fast", **ratio}],
        "memory": {
            "precision": "fast",
            **{
                f"{key}_bytes": (number + 1) << 20
                for number, key in enumerate(("rss", "nf4", "embedding", "kv_cache", "peak_rss"))
            },
        },
        "peers": {"nibble fast": {"dtype": "float32", "kernels": "avx2"}},
        "notes": ["llama.cpp is not measured: no reason"],
    }


def test_the_page_says_all_that_the_figures_say(figures: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "PERFORMANCE.md"
    chart = write_page(figures, page)
    text = page.read_text()
    assert chart == tmp_path / "PERFORMANCE.svg"
    assert "![output tokens per second](PERFORMANCE.svg)" in text
    assert "| 1 base | nibble fast: engine | 60.0 | 12.5 / 20.0 | 12.5 / 20.0 | 75%" in text
    assert "|  | peft: engine | 3.0 |" in text
    assert "400.0 (prompt)" in text
    assert text.count("3.50 (3.00 to 4.00)") == 2
    assert "20.0 GB/s" in text
    assert "| prefill | ≥ 0.9 | llama.cpp | 3.500 (3.000 to 4.000) | yes |" in text
    assert "| 8 distinct | ≥ 3 | x |  | not measured |" in text
    assert "| 1,000 | 12.50 | 3.500 (3.000 to 4.000) | 20.10 | 1.500 (1.000 to 2.000) |" in text
    assert "9 rounds of both" in text
    assert "measured once more side by side" in text
    assert "requests named 55 of them, 82% found theirs" in text
    assert "| mini, fast | 9.9 | 3.5 (3.4, 3.5, 3.6) | 400 | 300 | 500 |" in text
    assert "not available" in text
    assert "    nibble bench --suite full --llama\n" in text  # no places of this machine
    assert "- torch 9.9" in text
    assert "- llama.cpp is not measured: no reason" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):  # every line of a table has as many cells as its head
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_page_says_how_many_rounds_and_what_all_were_held_to(
    figures: dict[str, Any], tmp_path: Path
) -> None:
    base, peft, prefill = figures["results"]
    rows = [base, peft, peft | {"way": "mixed", "rounds": 4, "tokens_per_second_rounds": [1.0] * 4}]
    page = tmp_path / "page.md"
    write_page(figures | {"results": [*rows, prefill], "isa": "avx2"}, page)
    assert page.read_text().startswith("# Performance, held to avx2\n")
    assert ", A CPU &amp; more, held to avx2<" in (tmp_path / "page.svg").read_text()
    assert (
        "Rounds: nibble fast 1; peft 1 (engine), 4 (mixed). All that measures is held to avx2.\n"
        in page.read_text()
    )


def test_a_new_run_keeps_the_table_of_the_kernels(figures: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "PERFORMANCE.md"
    write_page(figures, page)
    without = page.read_text()
    bench_page.put(page, f"{bench_page.HEADING}\n\nTheir table.")
    write_page(figures, page)
    assert page.read_text() == f"{without}\n{bench_page.HEADING}\n\nTheir table.\n"


def test_a_run_without_others_says_so(figures: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    nothing: dict[str, Any] = {
        "ratios": [],
        "own_ratios": [],
        "notes": [],
        "starts": [],
        "registered": None,
        "side_by_side": False,
    }
    write_page(figures | nothing, page)
    assert "until `/ready`" not in page.read_text()
    assert "Not measured in this run." in page.read_text()
    assert "No other peer was measured" in page.read_text()
    assert "side by side" not in page.read_text()
    assert "less where the time was up" not in page.read_text()
    cut = [row | {"rounds": 3} for row in figures["results"]]
    write_page(figures | {"results": cut}, page)
    assert "Rounds: nibble fast 3; peft 3; less where the time was up.\n" in page.read_text()
    write_page(figures | {"notes": []}, page)
    assert "## Notes" not in page.read_text()


def test_bars_are_as_long_as_their_rates_within_a_scenario(figures: dict[str, Any]) -> None:
    root = ElementTree.fromstring(bar_chart(figures["results"], "a < b & c"))
    ground, *bars = root.iter(f"{SVG}rect")
    lengths = [float(bar.get("width", "")) for bar in bars]
    assert lengths[0] == lengths[2] > 0  # the best of each scenario
    assert lengths[1] == pytest.approx(lengths[0] * 3 / 60, abs=0.1)
    assert [bar.get("fill") == bars[0].get("fill") for bar in bars] == [True, False, True]
    assert max(float(bar.get("y", "")) for bar in bars) < float(ground.get("height", ""))
    assert "a < b & c" in [text.text for text in root.iter(f"{SVG}text")]
