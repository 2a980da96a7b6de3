from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from service.bench.cli import app

runner = CliRunner()


def test_the_figures_of_a_small_run(base_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--model", str(base_directory), "--rounds", "1", "--prompt-tokens", "8"]
    arguments += [
        "--new-tokens",
        "3",
        "--threads",
        "1",
        "--peft-dtype",
        "float32",
        "--json",
        str(out),
    ]
    arguments += ["--only", "8, distinct adapters"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert [row["way"] for row in figures["results"]] == [
        "engine",
        "set_adapter, one by one",
        "adapter_names, mixed batch",
    ]
    assert all(row["tokens_per_second"] > 0 for row in figures["results"])
    assert len(figures["ratios"]) == 2
    assert figures["memory"]["rss_bytes"] > figures["memory"]["nf4_bytes"] > 0
    assert figures["peers"]["nibble"]["adapter_bytes"] > figures["memory"]["adapter_bytes"] == 0
    assert figures["machine"]["versions"]["torch"]
    assert "mixed batch" in result.output


def test_an_unknown_model_or_scenario_is_refused() -> None:
    wrong = (["--model", "qwen9"], ["--only", "9 adapters"], ["--peft-dtype", "int8"])
    for arguments in wrong:
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2, result.output
