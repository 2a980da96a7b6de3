"""TensorBoard, MLflow and Weights & Biases: what they were told is read back from their files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from training.config import TrackerName, TrainConfig
from training.errors import ConfigError
from training.recipe import Step
from training.trackers import asked_for, figures, tracked

STEPS = [Step(n, 5.0 / n, 1e-3, 100 * n, 0.5 * n, 4.0 if n == 4 else None) for n in range(1, 7)]


def _config(*logs: TrackerName) -> TrainConfig:
    return TrainConfig.model_validate({"data": {"train": "x"}, "logs": logs})


def _run_twice(config: TrainConfig, directory: Path) -> None:
    """Six steps, of which 5 and 6 are run again after a resume at 4."""
    directory.mkdir()
    with tracked(config, directory, 0) as note:
        for step in STEPS:
            note(step)
    with tracked(config, directory, 4) as note:
        for step in STEPS[4:]:
            note(step)


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    with tracked(_config(), tmp_path, 0) as note:
        note(STEPS[0])
    assert not list(tmp_path.iterdir())


def test_one_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="logs: wandb is not installed") as refused:
        asked_for(_config("wandb"))
    assert refused.value.field == "logs"
    assert asked_for(TrainConfig.model_validate({"data": {"train": "x"}})) == ()


def test_tensorboard_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[[str], object] = lambda name: name  # noqa: E731
    monkeypatch.setattr("training.trackers.find_spec", found)
    assert asked_for(TrainConfig.model_validate({"data": {"train": "x"}})) == ("tensorboard",)
    assert asked_for(_config("mlflow")) == ("mlflow",)


def test_tensorboard_reads_back_what_was_noted(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        _run_twice(_config("tensorboard"), tmp_path / "run")
        read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == set(figures(STEPS[3]))
    for name in figures(STEPS[0]):
        found = {event.step: event.value for event in read.Scalars(name)}
        assert found == pytest.approx({s.number: figures(s)[name] for s in STEPS})
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [(e.step, e.value) for e in read.Scalars("eval/loss")] == [(4, 4.0)]


def test_mlflow_keeps_one_run_with_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run_twice(_config("mlflow"), tmp_path / "run")
        (run,) = mlflow.search_runs(experiment_names=["nibble"], output_format="list")
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert run.data.params["optim.steps"] == "300"
    assert run.data.metrics["eval/loss"] == 4.0
    assert {m.step: m.value for m in history} == pytest.approx({s.number: s.loss for s in STEPS})


def test_wandb_stays_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run_twice(_config("wandb"), tmp_path / "run")
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    files = [file for folder in folders for file in folder.glob("*.wandb")]
    assert files
    assert b"train/loss" in b"".join(file.read_bytes() for file in files)
