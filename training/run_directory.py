"""A run on disk: its config, its log, its checkpoint, and at the end the adapter itself.

out/adapter_config.json, adapter_model.safetensors   the adapter, once the run has ended
out/run/config.yaml                                  the resolved config
out/run/log.jsonl                                    a line for each step
out/run/events.jsonl                                 a line for each thing that happened
out/run/checkpoint.safetensors                       what `--resume` goes on from

Whoever follows a run from outside reads the two logs: times are in seconds since the epoch.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from adapters import evaluation, origin
from base.checkpoint import INDEX
from base.checkpoint import WEIGHTS as BASE_WEIGHTS
from training.config import TrainConfig, as_now, flat
from training.errors import ConfigError
from training.methods.files import CONFIG, WEIGHTS
from training.recipe import Step
from training.tree import read_tree, write_tree

MADE = (WEIGHTS, BASE_WEIGHTS, INDEX)


class RunDirectory:
    """The directory `out/run` of one run."""

    def __init__(self, out: Path, writes: bool = True) -> None:
        self.path = out / "run"
        self.writes = writes  # False: another process of this run does

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    def refuse_to_overwrite(self) -> None:
        """Raises ConfigError where `out` holds what an earlier run made, or could go on from."""
        out = self.path.parent
        if self.checkpoint.exists():
            raise ConfigError(
                f"{out} holds a run: --resume goes on from its checkpoint, --overwrite begins "
                "anew in its place, and another out leaves it alone",
                "out",
            )
        made = [out / name for name in MADE if (out / name).exists()]
        if made:
            raise ConfigError(
                f"{made[0]} is there already: --overwrite puts another in its place, and another "
                "out leaves it alone",
                "out",
            )

    def begin(self, config: TrainConfig) -> None:
        """A new run: what an earlier one left here is removed, so that nobody takes its adapter
        for the new one's. A base stays until another is whole: it may be what is trained."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        out = self.path.parent
        ours = [out / name for name in (CONFIG, WEIGHTS, evaluation.FILE, origin.FILE)]
        adapter = ours if (out / CONFIG).exists() else []
        for left in (self.checkpoint, self.log, self.events, *adapter):
            left.unlink(missing_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def resume(self, config: TrainConfig) -> dict[str, Any]:
        """The last checkpoint. Raises ConfigError where there is none, or it is another run's."""
        try:
            kept: dict[str, Any] = read_tree(self.checkpoint)
        except FileNotFoundError:
            raise ConfigError(f"{self.checkpoint}: no checkpoint to resume from") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.checkpoint}: {error}") from None
        now, then = flat(_decisive(config)), flat(_filled(kept["config"]))
        if config.optim.epochs is not None:  # and its rows, which are compared, make the steps
            now["optim.steps"] = then.get("optim.steps")
        unlike = sorted(key for key in now | then if then.get(key) != now.get(key))
        if unlike:
            said = "; ".join(f"{key} {then.get(key)!r}, now {now.get(key)!r}" for key in unlike)
            raise ConfigError(f"{self.checkpoint} was made with another {said}", unlike[0])
        self._cut_log(kept["run"]["progress"]["step"])
        state: dict[str, Any] = kept["run"]
        return state

    def keep(self, config: TrainConfig, state: dict[str, Any]) -> None:
        """Write a checkpoint: whole, or not at all."""
        if self.writes:
            write_tree(self.checkpoint, {"config": _decisive(config), "run": state})

    def note(self, step: Step) -> None:
        """One line of the log."""
        line = {key: value for key, value in asdict(step).items() if value is not None}
        if self.writes:
            _append(self.log, line | {"time": round(time.time(), 3)})

    def happened(self, what: str, **data: Any) -> None:
        """One line of the events: prepared, started, checkpoint, finished."""
        if self.writes:
            _append(self.events, {"event": what, "time": round(time.time(), 3), **data})

    def _cut_log(self, step: int) -> None:
        """Take off the lines after the checkpoint: these steps are run again."""
        if not self.writes or not self.log.exists():
            return
        lines = self.log.read_text(encoding="utf-8").splitlines()[:step]
        self.log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """What must not change between a run and its continuation."""
    fields: dict[str, Any] = config.model_dump(mode="json")
    decisive = ("base", "double_quant", "data", "method", "optim", "eval", "seed")
    return {key: fields[key] for key in decisive}


def _filled(kept: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run, with the defaults of fields that are younger than it: a
    new field's default is how a run went before. As it is where a field is no longer known."""
    config = as_now({"double_quant": False, **kept})  # before it could be asked for
    return kept if config is None else _decisive(config)
