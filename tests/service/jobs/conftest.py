"""A queue in a catalog of its own, and a runner whose `nibble` is a stand-in."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapters.catalog import Catalog
from service.jobs.files import TrainingFile, TrainingFiles
from service.jobs.job import Job, Status
from service.jobs.order import FileStamp, Order
from service.jobs.process import Confinement
from service.jobs.queue import Queue
from service.jobs.runner import Runner, Workshop
from tests.waiting import PATIENCE, until

HOME = "0" * 32


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    found = Catalog(str(tmp_path / "catalog.db"))
    yield found
    found.close()


@pytest.fixture
def files(catalog: Catalog, tmp_path: Path) -> TrainingFiles:
    return TrainingFiles(catalog, tmp_path / "files", HOME)


@pytest.fixture
def queue(catalog: Catalog) -> Queue:
    return Queue(catalog, HOME)


def keep(files: TrainingFiles, tmp_path: Path, content: bytes = b"{}\n") -> TrainingFile:
    source = tmp_path / "uploaded"
    source.write_bytes(content)
    return files.add(
        source,
        filename="data.jsonl",
        purpose="fine-tune",
        suffix=".jsonl",
        nbytes=len(content),
        sha256="0" * 64,
    )


def order_of(file: TrainingFile, **fields: Any) -> Order:
    stamp = FileStamp(file.id, file.filename, file.suffix, file.nbytes, file.sha256)
    return Order(model="mini", name="made", training=stamp, **fields)


@dataclass
class Published:
    """Takes what is trained; raises what it is told to."""

    jobs: list[str] = field(default_factory=list)
    error: Exception | None = None
    replaced: list[bool] = field(default_factory=list)  # what each was told

    def publish(self, job: Job, directory: Path, done: dict[str, Any]) -> str:
        self.replaced.append(job.order.replaces)
        if self.error is not None:
            raise self.error
        self.jobs.append(job.id)
        return f"{job.order.name}@{len(self.jobs)}"


@dataclass
class Bench:
    """A queue with its runner; `restart` is what a server does that was ended and comes again."""

    queue: Queue
    files: TrainingFiles
    home: Path
    published: Published = field(default_factory=Published)
    plan: dict[str, Any] = field(default_factory=dict)
    runner: Runner | None = None

    def start(self) -> Runner:
        program = self.home / "nibble_stand_in.py"
        self.home.mkdir(exist_ok=True)
        shutil.copy(Path(__file__).with_name("nibble_stand_in.py"), program)
        (self.home / "plan.json").write_text(json.dumps(self.plan))
        confinement = Confinement(nibble=(sys.executable, "-I", "-S", str(program)))
        workshop = Workshop(self.home / "jobs", "a base", confinement)
        self.runner = Runner(self.queue, self.files, workshop, self.published)  # type: ignore[arg-type]
        self.runner.start()
        return self.runner

    def stop(self) -> None:
        if self.runner is not None:
            self.runner.stop(PATIENCE)
            self.runner = None

    def restart(self, **plan: Any) -> None:
        self.stop()
        self.plan |= plan
        self.start()

    def until(self, job: Job, *statuses: Status) -> Job:
        until(lambda: self.queue.get(job.id).status in statuses)
        return self.queue.get(job.id)

    def step(self, job: Job, number: int) -> None:
        """Wait until a step of the job is logged."""
        log = self.home / "jobs" / job.id / "adapter/run/log.jsonl"
        self.when(lambda: log.exists() and log.read_text().count("\n") >= number)

    def go(self, job: Job) -> None:
        """Let a run go on that waits behind a step."""
        (self.home / "jobs" / job.id / "adapter/run/go").touch()

    def when(self, condition: Callable[[], bool]) -> None:
        until(condition)

    def messages(self, job: Job) -> list[str]:
        return [note.message for note in self.queue.notes(job.id)]


@pytest.fixture
def bench(
    queue: Queue, files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    monkeypatch.setattr("service.jobs.runner.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("service.jobs.runner.LOOK_SECONDS", 0.03)
    found = Bench(queue, files, tmp_path / "bench")
    yield found
    found.stop()
