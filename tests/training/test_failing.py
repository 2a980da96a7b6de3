"""Runs that began and cannot go on: each ends with one line, and leaves nothing half."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from training import recipe
from training.cli import app
from training.methods.files import WEIGHTS
from training.tree import replacing


@pytest.fixture
def flags(base_directory: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    out = ["--out", str(tmp_path / "out"), "--steps", "6"]
    return ["run", "--base", str(base_directory), "--data", str(data), *out]


def _failed(flags: list[str], *more: str) -> str:
    done = CliRunner().invoke(app, [*flags, *more])
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.output.strip().splitlines()[-1]


def test_a_run_that_diverges_ends_before_a_weight_is_spoilt(
    flags: list[str], tmp_path: Path
) -> None:
    said = _failed(flags, "--lr", "1e30")
    assert said.startswith("failed: step ")
    assert "optim.learning_rate" in said
    assert not (tmp_path / "out" / WEIGHTS).exists()
    for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, which JSON has not


def test_a_failure_is_one_line_of_json_too(flags: list[str]) -> None:
    done = CliRunner().invoke(app, [*flags, "--lr", "1e30", "--json"])
    assert done.exit_code == 1
    assert "diverged" in json.loads(done.stdout)["error"]["message"]
    assert done.stderr.startswith("failed: step ")  # the last words, for whoever reads a log


def test_a_disk_that_is_full_is_named(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/run/log.jsonl")

    monkeypatch.setattr("training.run_directory._append", full)
    assert _failed(flags) == "failed: out/run/log.jsonl: No space left on device"


def test_an_out_that_is_a_file_is_named(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert _failed(flags).startswith(f"failed: {tmp_path / 'out'}")
    assert (tmp_path / "out").read_text() == "mine"


def test_too_little_memory_says_what_would_help(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(recipe, "batch_loss", too_much)
    said = _failed(flags)
    assert said.startswith("failed: CUDA out of memory. Tried to allocate 2 GiB")
    assert "nibble train plan" in said


def test_a_file_stays_as_it_was_where_its_successor_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.write_text("first")

    def broken_off() -> None:
        with replacing(path) as written:
            written.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS]
    assert path.read_text() == "first"
    with replacing(path) as written:
        written.write_text("second")
    assert path.read_text() == "second"
