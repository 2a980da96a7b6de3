"""Events: states and steps in one list, whatever a kill left of the log; pages, and followed."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from service.errors import NotFound
from service.jobs import progress
from service.jobs.files import TrainingFiles
from service.jobs.history import follow, history, page
from service.jobs.job import Job
from service.jobs.queue import Queue
from tests.service.jobs.conftest import keep, order_of
from tests.waiting import PATIENCE


def line(number: int, loss: float = 1.0, at: float | None = None) -> str:
    fields = {"number": number, "loss": loss, "learning_rate": 0.1, "tokens": 8 * number}
    return json.dumps({**fields, "time": time.time() if at is None else at}) + "\n"


def write(directory: Path, text: str) -> None:
    log = directory / "adapter/run/log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(text)


@pytest.fixture
def job(queue: Queue, files: TrainingFiles, tmp_path: Path) -> Job:
    return queue.add(order_of(keep(files, tmp_path)))


def test_a_torn_line_and_steps_that_ran_twice(tmp_path: Path) -> None:
    write(tmp_path, line(1) + line(2, 5.0) + '{"number": 3, "lo\n' + line(2, 2.0) + '{"number"')
    assert [(step.number, step.loss) for step in progress.steps(tmp_path)] == [(1, 1.0), (2, 2.0)]
    latest = progress.latest(tmp_path)
    assert latest is not None
    assert (latest.number, latest.loss) == (2, 2.0)
    assert progress.steps(tmp_path, after=2) == []
    assert progress.latest(tmp_path / "nowhere") is None


def test_a_loss_that_is_no_number_is_none(tmp_path: Path) -> None:
    write(tmp_path, line(1, float("nan")))
    assert [step.loss for step in progress.steps(tmp_path)] == [None]


def test_pages_of_states_and_steps(queue: Queue, job: Job, tmp_path: Path) -> None:
    write(tmp_path, "".join(line(n) for n in range(1, 6)))
    queue.note(job.id, "warn", "last")
    events = history(queue, job, tmp_path)
    assert [event.type for event in events] == ["message", *["metrics"] * 5, "message"]
    newest, more = page(events, None, 2)
    assert ([event.message.split(":")[0] for event in newest], more) == (["last", "Step 5"], True)
    rest, more = page(events, newest[-1].id, 10)
    assert (len(rest), more) == (5, False)
    assert rest[0].data == {"step": 4, "train_loss": 1.0, "learning_rate": 0.1, "tokens": 32}
    with pytest.raises(NotFound):
        page(events, "ftevent-x", 2)


def test_events_as_they_come_end_with_the_job(queue: Queue, job: Job, tmp_path: Path) -> None:
    async def read() -> list[str]:
        found = []
        async for event in follow(queue, job.id, tmp_path, lambda: False):
            found.append(event.message)
            if len(found) == 1:
                write(tmp_path, line(1))
            if len(found) == 2:
                queue.cancel(job.id)
        return found

    created, step, cancelled = asyncio.run(asyncio.wait_for(read(), PATIENCE))
    assert created.startswith("Created")
    assert step.startswith("Step 1: training loss=1.0")
    assert cancelled == "Cancelled."
