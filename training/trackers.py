"""Where a run's figures go beside its own log: TensorBoard, MLflow, Weights & Biases.

Each is a package that a user may have; none is needed. Nothing leaves this machine unless its own
variables say so: MLFLOW_TRACKING_URI, or WANDB_MODE=online.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.config import TrackerName, TrainConfig, flat
from training.errors import ConfigError
from training.recipe import Step

Note = Callable[[Step], None]
PROJECT = "nibble"


def asked_for(config: TrainConfig) -> tuple[TrackerName, ...]:
    """The run's trackers. Raises ConfigError where one of them is not installed."""
    if config.logs is None:
        return ("tensorboard",) if find_spec("tensorboard") else ()
    for name in config.logs:
        if find_spec(name) is None:
            raise ConfigError(
                f"logs: {name} is not installed; pip install {name}, or leave it out", "logs"
            )
    return config.logs


@contextmanager
def tracked(config: TrainConfig, directory: Path, started_at: int) -> Iterator[Note]:
    """Within it, what every step is handed to; `directory` is the run's, and a resumed run
    started at another step than 0."""
    with ExitStack() as stack:
        notes = [
            stack.enter_context(_TRACKERS[name](config, directory, started_at))
            for name in asked_for(config)
        ]

        def note(step: Step) -> None:
            for one in notes:
                one(step)

        yield note


def figures(step: Step) -> dict[str, float]:
    """What is drawn of a step, by name."""
    found = {
        "train/loss": step.loss,
        "train/learning_rate": step.learning_rate,
        "train/tokens": float(step.tokens),
        "train/seconds": step.seconds,
    }
    return found if step.eval_loss is None else {**found, "eval/loss": step.eval_loss}


@contextmanager
def _tensorboard(config: TrainConfig, directory: Path, started_at: int) -> Iterator[Note]:
    from torch.utils.tensorboard import SummaryWriter

    # Steps after a checkpoint are run again: what was drawn of them is taken off.
    purge = started_at + 1 if started_at else None
    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def note(step: Step) -> None:
        for name, value in figures(step).items():
            writer.add_scalar(name, value, step.number)

    try:
        yield note
    finally:
        writer.close()


@contextmanager
def _mlflow(config: TrainConfig, directory: Path, started_at: int) -> Iterator[Note]:
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{directory.resolve() / 'mlflow.db'}")
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_id=_kept(directory / "mlflow.run", started_at)) as run:
        (directory / "mlflow.run").write_text(run.info.run_id, encoding="utf-8")
        if not started_at:
            mlflow.log_params(flat(config.model_dump(mode="json")))

        def note(step: Step) -> None:
            mlflow.log_metrics(figures(step), step=step.number)

        yield note


@contextmanager
def _wandb(config: TrainConfig, directory: Path, started_at: int) -> Iterator[Note]:
    import wandb

    run = wandb.init(
        project=PROJECT,
        dir=str(directory),
        config=config.model_dump(mode="json"),
        mode=os.environ.get("WANDB_MODE", "offline"),
        id=_kept(directory / "wandb.run", started_at),
        resume="allow",
    )
    (directory / "wandb.run").write_text(run.id, encoding="utf-8")

    def note(step: Step) -> None:
        run.log(figures(step), step=step.number)

    try:
        yield note
    finally:
        run.finish()


_TRACKERS: Mapping[TrackerName, Callable[..., Any]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}


def _kept(file: Path, started_at: int) -> str | None:
    """The tracker's own name of the run that goes on."""
    return file.read_text(encoding="utf-8") if started_at and file.is_file() else None
