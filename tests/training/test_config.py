from __future__ import annotations

from pathlib import Path

import pytest

from training.config import read_config
from training.errors import ConfigError


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "data: {train: a.jsonl}\noptim: {steps: 7, batch_size: 3}\n")
    config = read_config(path, {"optim.steps": 9, "optim.batch_size": None, "method.kind": "dora"})
    assert (config.optim.steps, config.optim.batch_size) == (9, 3)
    assert config.method.kind == "dora"


def test_steps_win_over_the_epochs_of_the_file_and_both_are_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, "data: {train: a.jsonl}\noptim: {epochs: 3}\n")
    assert read_config(path, {}).optim.epochs == 3
    assert read_config(path, {"optim.steps": 9}).optim.epochs is None
    with pytest.raises(ConfigError, match="one of them"):
        read_config(None, {"data.train": "a", "optim.steps": 9, "optim.epochs": 2})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {train: a.jsonl}\nmethod: {rnak: 4}\n", r"method.rnak: .* rank, .*\(got '4'\)"),
        (
            "data: {train: a}\nmethod: {kind: ia3, r: 4}\n",
            "method.r: .*; targets, kind, feed",
        ),
        ("data: {train: a.jsonl}\noptim: {lr: 1}\n", "optim.lr: .* learning_rate, .* are known"),
        ("data: {train: a.jsonl}\nlora: {r: 1}\n", "lora: .*; base, .* data, method, .* are known"),
        (
            "data: {train: a}\npublish: {nam: a}\n",
            "publish.nam: .*; name, url, store are",
        ),
        (
            "data: {train: a}\nmethod: {kind: magic}\n",
            r"method.kind: one of lora, .*'magic'",
        ),
        ("optim: {steps: 3}\n", "data"),
        ("- 1\n", "mapping"),
        ("a: [\n", "YAML"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config(_file(tmp_path, text), {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        read_config(tmp_path / "none.yaml", {})
