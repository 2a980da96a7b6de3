"""The suite for one device, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from base.load import load_base
from base.nf4 import NF4Linear
from service.bench import device
from service.bench.cli import app
from service.bench.dense_twin import dense_twin


@pytest.mark.slow
def test_rows_of_a_small_run(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_limits", lambda device: {"gbytes": 10.0, "gflops": 100.0})
    asked = device.Asked(
        "tiny", base_directory, "cpu", 2, 6, 4, minutes=0.0, command="it", counts=(1, 2)
    )
    figures = device.measure(asked)
    rows = [(r["weights"], r["requests"], r["adapters"]) for r in figures["results"]]
    kinds = (("dense", 0), ("nf4", 0), ("nf4", 1))
    assert rows == [(weights, n, n * adapted) for n in (1, 2) for weights, adapted in kinds]
    dense, nf4, adapted = figures["results"][3:]
    assert dense["ratio"] == 1.0
    wanted = adapted["tokens_per_second"] / dense["tokens_per_second"]
    assert adapted["ratio"] == pytest.approx(wanted, abs=1e-3)
    assert min(dense["least_step_ms"], adapted["least_step_ms"]) > nf4["least_step_ms"] > 0
    assert nf4["of_limit"] == pytest.approx(nf4["least_step_ms"] / nf4["step_ms"], rel=0.05)
    assert all(r["steps_eager"] >= 3 and not r["steps_replayed"] for r in figures["results"])
    assert all(len(r["tokens_per_second_rounds"]) == 1 for r in figures["results"])  # 0 minutes
    page = device.markdown(json.loads(json.dumps(figures)))
    assert f"| 2 | NF4 | 2 | {adapted['tokens_per_second']:.1f} |" in page


def test_the_twin_multiplies_with_what_nf4_stands_for(base_directory: Path) -> None:
    base = load_base(base_directory, device="cpu", dtype="float32", keep=False)
    ids = torch.tensor([[5, 9, 300, 7]])
    with torch.inference_mode():
        wanted = base.model(input_ids=ids).logits
        twin = dense_twin(base)
        assert not any(isinstance(module, NF4Linear) for module in twin.model.modules())
        torch.testing.assert_close(twin.model(input_ids=ids).logits, wanted)
    path = next(path for path in twin.spec.linears if "q_proj" in path)
    assert twin.linear(path) is twin.model.get_submodule(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(app, ["--device", "cuda"])
    assert result.exit_code == 2
    assert "no CUDA device" in result.output
    result = CliRunner().invoke(app, ["--device", "tpu"])
    assert "cpu or cuda" in result.output
