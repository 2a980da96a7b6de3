from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training.cli import app

runner = CliRunner()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    result = runner.invoke(
        app,
        ["data", "tickets", "--out", str(tmp_path), "--train-items", "12", "--test-items", "4"],
    )
    assert result.exit_code == 0, result.output
    return tmp_path


def test_data_writes_rows_that_can_be_learnt_from(data: Path) -> None:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]


def test_run_then_eval(data: Path, base_directory: Path) -> None:
    config = data / "run.yaml"
    config.write_text(
        f"base: {base_directory}\ndata: {{train: {data}/train.jsonl, eval: {data}/test.jsonl}}\n"
        f"method: {{kind: dora, rank: 2}}\noptim: {{steps: 50, batch_size: 4}}\n"
    )
    out = data / "adapter"
    result = runner.invoke(app, ["run", str(config), "--steps", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is True
    result = runner.invoke(
        app,
        ["eval", str(data / "test.jsonl"), "--base", str(base_directory), "--adapter", str(out)],
    )
    assert result.exit_code == 0, result.output
    assert "of 4" in result.output


def test_refusals_are_one_line(data: Path, base_directory: Path) -> None:
    rows = data / "empty.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    arguments = ["run", "--base", str(base_directory), "--data", str(rows), "--steps", "1"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "no token bears loss" in result.output
    assert "Traceback" not in result.output
