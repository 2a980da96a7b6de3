"""What became of a job, as one list: its states from the catalog, its steps from its log."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio

from service.errors import NotFound
from service.jobs import progress
from service.jobs.job import Job
from service.jobs.queue import Level, Note, Queue

LOOK_SECONDS = 0.3  # between two looks of one that follows
_EVENT_ID = re.compile(r"ftevent-[0-9a-f]{24}-[ns]\d{1,12}")


@dataclass(frozen=True, slots=True)
class Event:
    """Something to tell of a job; `id` is the same whenever it is told."""

    id: str
    created: float
    level: Level
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = field(default_factory=dict)


def history(queue: Queue, job: Job, directory: Path) -> list[Event]:
    """All of it, oldest first."""
    events = [_of_note(job, note) for note in queue.notes(job.id)]
    events += [_of_step(job, step) for step in progress.steps(directory)]
    return sorted(events, key=lambda event: event.created)  # stable: each list is in order


def page(events: list[Event], after: str | None, limit: int) -> tuple[list[Event], bool]:
    """The newest first, `limit` of them after the one with id `after`; and whether there are more.

    Raises NotFound.
    """
    newest = events[::-1]
    if after is not None:
        place = next((i for i, event in enumerate(newest) if event.id == after), None)
        if place is None or not _EVENT_ID.fullmatch(after):
            raise NotFound(f"event {after[:80]!r} does not exist", "after")
        newest = newest[place + 1 :]
    return newest[:limit], len(newest) > limit


async def follow(
    queue: Queue, job_id: str, directory: Path, over: Callable[[], bool]
) -> AsyncIterator[Event]:
    """Each event as it happens, the old ones first, until the job has ended or `over()`."""
    note, step = 0, 0
    while True:
        last = over()
        job = await anyio.to_thread.run_sync(queue.get, job_id)
        notes = await anyio.to_thread.run_sync(queue.notes, job_id, note)
        taken = await anyio.to_thread.run_sync(progress.steps, directory, step)
        events = [_of_note(job, one) for one in notes] + [_of_step(job, one) for one in taken]
        note = max([note, *(one.number for one in notes)])
        step = max([step, *(one.number for one in taken)])
        for event in sorted(events, key=lambda event: event.created):
            yield event
        if last or job.ended:
            return
        await anyio.sleep(LOOK_SECONDS)


def _of_note(job: Job, note: Note) -> Event:
    return Event(f"{_stem(job)}-n{note.number}", note.created, note.level, note.message)


def _of_step(job: Job, step: progress.Step) -> Event:
    data: dict[str, Any] = {
        "step": step.number,
        "train_loss": step.loss,
        "learning_rate": step.learning_rate,
        "tokens": step.tokens,
    }
    if step.eval_loss is not None:
        data["valid_loss"] = step.eval_loss
    loss = "not finite" if step.loss is None else f"{step.loss:.4f}"
    message = f"Step {step.number}: training loss={loss}"
    if step.eval_loss is not None:
        message += f", validation loss={step.eval_loss:.4f}"
    return Event(f"{_stem(job)}-s{step.number}", step.time, "info", message, "metrics", data)


def _stem(job: Job) -> str:
    return "ftevent-" + job.id.removeprefix("ftjob-")
