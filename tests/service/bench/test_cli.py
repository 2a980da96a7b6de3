from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from base.machine import Machine
from service.bench.cli import _asked, _dtypes, app
from service.bench.scenario import FULL, PREFILL, QUICK

runner = CliRunner()


def test_the_figures_of_a_small_run(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/nibble", "bench", "--rounds", "1"])
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
    page = tmp_path / "PERFORMANCE.md"
    arguments += ["--only", "8, distinct adapters", "--precision", "exact", "--no-llama"]
    arguments += ["--markdown", str(page)]
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
    assert (
        figures["peers"]["nibble exact"]["adapter_bytes"] > figures["memory"]["adapter_bytes"] == 0
    )
    assert figures["machine"]["versions"]["torch"]
    assert "mixed batch" in result.output
    assert figures["command"] == "nibble bench --rounds 1"
    assert all("limit" in row for row in figures["results"])
    assert figures["limits"]["read_gbytes"] > 0
    assert "adapter_names, mixed batch" in page.read_text()
    targets = {row["what"]: row["reached"] for row in figures["targets"]}
    assert targets["prefill"] is None
    assert targets["8 distinct adapters"] in (True, False)
    assert (tmp_path / "PERFORMANCE.svg").read_text().count("<rect") == 4  # the ground, 3 bars


def test_a_suite_or_what_was_named_of_it() -> None:
    assert _asked("quick", None) == (QUICK, ())
    assert _asked("full", None) == (FULL, ("registered adapters", "start and memory"))
    assert _asked("quick", ["prefill 512", "start and memory"]) == (
        (PREFILL,),
        ("start and memory",),
    )


def test_bfloat16_is_tried_only_where_the_cpu_multiplies_it() -> None:
    assert _dtypes("auto", Machine("", ("avx2", "avx512f"), 2, 1, 1)) == ("float32",)
    assert _dtypes("auto", Machine("", ("avx512_bf16",), 2, 1, 1)) == ("float32", "bfloat16")
    assert _dtypes("bfloat16", Machine("", (), 2, 1, 1)) == ("bfloat16",)


def test_the_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("base.kernels.bench.main", asked.append)
    for page in ([], ["--markdown", "PERFORMANCE.md"]):
        result = runner.invoke(app, ["--kernel", "--threads", "1", *page])
        assert result.exit_code == 0, result.output
        assert asked.pop() == ["--threads", "1", *page]


def test_an_unknown_model_or_scenario_is_refused() -> None:
    wrong = [["--model", "qwen9"], ["--only", "9 adapters"], ["--peft-dtype", "int8"]]
    wrong += [["--suite", "slow"], ["--precision", "half"], ["--llama-server", "/nowhere"]]
    for arguments in wrong:
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2, result.output


def test_a_device_that_is_not_benched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, told in (
        (["--device", "cuda"], "there is no CUDA device here"),
        (["--kernel", "--device", "tpu"], "got tpu; cpu or cuda"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert told in result.output


def test_kernels_on_cuda_have_a_bench_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("base.kernels.bench_cuda.main", asked.append)
    result = runner.invoke(app, ["--kernel", "--device", "cuda"])
    assert result.exit_code == 0, result.output
    assert asked == [[]]
