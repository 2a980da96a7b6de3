from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from base.machine import Machine
from service.bench.cli import _asked, _dtypes, app
from service.bench.scenario import FULL, PREFILL, QUICK

runner = CliRunner()


def _unwrapped(output: str) -> str:
    """What is in a box, on one line."""
    return " ".join(output.replace("│", " ").split())


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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "qwen9"], "--model: got qwen9; a directory with a model, mini, qwen2-0.4b"),
        (["--only", "9 adapters"], '--only: got 9 adapters; there are "1 base", "1 adapter", "8,'),
        (["--peft-dtype", "int8"], "--peft-dtype: got int8; auto, float32 or bfloat16"),
        (["--suite", "slow"], "--suite: got slow; quick, full or device"),
        (["--precision", "half"], "--precision: got half; fast or exact"),
        (["--llama-server", "/nowhere"], "--llama-server: /nowhere is not there"),
        (["--llama-server", "/"], "--llama-server: / is no program that can be run"),
        (["--json", "/nowhere/a.json"], "--json: /nowhere/a.json: the directory /nowhere is not"),
        (["--markdown", "/"], "--markdown: / is a directory; a file is needed"),
        (["--isa", "mmx"], "--isa: got mmx; avx2 is known"),
        (["--kernel", "--isa", "avx2"], "--kernel: not with --isa"),
        (["--suite", "device", "--isa", "avx2"], "--isa: not with --suite device"),
        (["qwen2-0.4b"], "got 'qwen2-0.4b', which is neither an option's value nor one of beside-"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(arguments: list[str], told: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert told in _unwrapped(result.output)


def test_a_server_whose_weights_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.bench.cli.missing", lambda: ("llama-cpp-python", "gguf"))
    result = runner.invoke(app, ["--llama-server", "/bin/true"])
    assert result.exit_code == 2
    assert "written with llama-cpp-python and gguf: pip install" in _unwrapped(result.output)


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
