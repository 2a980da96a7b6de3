"""The threads that work on the queue: one checks data, others train, one job each.

A lock in the directory of jobs is held for as long as a server or any process of its jobs lives: so
a second server on the same home runs nothing, and a new one waits until what was left of the last
one has ended. What ended with the server goes on from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from adapters.blobs import disk_errors
from adapters.errors import AdapterError, QuotaReached, StoreFull
from service.errors import NotFound, NotTrained, ServiceError
from service.jobs import progress
from service.jobs.directory import CONFIG, drop_data, prepare, write_config
from service.jobs.files import TrainingFiles
from service.jobs.job import Checked, Fault, Job
from service.jobs.order import TRAINING
from service.jobs.process import STOPPED, Confinement, TrainProcess
from service.jobs.publication import Publication
from service.jobs.queue import Queue
from service.jobs.results import step_metrics
from service.jobs.verdict import MOST_STARTS, death, verdict, why_it_failed

LOOK_SECONDS = 0.5  # between two looks at a process
IDLE_SECONDS = 2.0  # between two looks at an empty queue
CHECK_SECONDS = 1800.0
STOP_SECONDS = 120.0  # for a run to end its step; then it is killed

logger = structlog.get_logger("nibble.jobs")


@dataclass(frozen=True, slots=True)
class Workshop:
    """What jobs are run with. `base` is a directory."""

    home: Path  # a directory of this server's own: one folder for each job
    base: str
    confinement: Confinement = field(default_factory=Confinement)
    at_once: int = 1
    max_minutes: float = 24 * 60.0
    double_quant: bool | None = None  # as the base serves

    def directory(self, job_id: str) -> Path:
        return self.home / job_id


class Runner:
    """Works on the queue from `start` to `stop`."""

    def __init__(
        self,
        queue: Queue,
        files: TrainingFiles,
        workshop: Workshop,
        publication: Publication,
    ) -> None:
        self._queue, self._files = queue, files
        self._workshop, self._publication = workshop, publication
        self._threads: list[threading.Thread] = []
        self._news = threading.Condition()
        self._stopping = False
        self._stop_at = float("inf")
        self._lock: int | None = None
        self._began = time.time()

    # The server's side

    def start(self) -> None:
        self._workshop.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        work: list[Callable[[], None]] = [self._check_all]
        work += [self._run_all] * self._workshop.at_once
        held = threading.Thread(target=self._begin, args=(work,), name="nibble-jobs", daemon=True)
        held.start()
        self._threads.append(held)

    def wake(self) -> None:
        """Something may have changed in the queue."""
        with self._news:
            self._news.notify_all()

    def ask_to_stop(self, seconds: float) -> None:
        """Have everything that runs write a checkpoint and end, within `seconds`; at once."""
        self._stopping = True
        self._stop_at = time.monotonic() + seconds
        self.wake()

    def stop(self, seconds: float) -> None:
        """The same, and wait for it: no process is left."""
        if not self._stopping:
            self.ask_to_stop(seconds)
        for thread in list(self._threads):
            thread.join()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def stopping(self) -> bool:
        return self._stopping

    # Threads

    def _begin(self, work: list[Callable[[], None]]) -> None:
        """Wait until the jobs are this server's, then have everybody work."""
        if not self._acquire():
            return
        for done in (partial(self._queue.recover, MOST_STARTS), self._sweep):
            self._surely(done)
        threads = [
            threading.Thread(target=one, name=f"nibble-jobs-{n}", daemon=True)
            for n, one in enumerate(work)
        ]
        self._threads += threads
        for thread in threads:
            thread.start()
        for thread in threads:  # a process is killed when the thread that started it ends
            thread.join()

    def _acquire(self) -> bool:
        lock = os.open(self._workshop.home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        said = False
        while not self._stopping:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    logger.warning("another process works on the jobs here; waiting for its end")
                said = True
                self._wait(IDLE_SECONDS)
            else:
                self._lock = lock
                return True
        os.close(lock)
        return False

    def _check_all(self) -> None:
        self._work(lambda: self._queue.next_in("validating_files"), self._check)

    def _run_all(self) -> None:
        self._work(self._queue.claim, self._run)

    def _work(self, take: Callable[[], Job | None], do: Callable[[Job], None]) -> None:
        while not self._stopping:
            job = self._surely(take)
            if job is None:
                self._wait(IDLE_SECONDS)
                continue
            try:
                do(job)
            except Exception as error:  # never the end of the thread: others are waiting
                logger.error("a job could not be worked on", job=job.id, exc_info=True)
                self._surely(partial(self._broken, job, error))
                self._wait(IDLE_SECONDS)
            self._surely(partial(self._tidy, job.id))

    def _tidy(self, job_id: str) -> None:
        if self._queue.get(job_id).over:
            with disk_errors("cannot remove the data of a job"):
                drop_data(self._workshop.directory(job_id))

    def _broken(self, job: Job, error: Exception) -> None:
        code = "store_full" if isinstance(error, StoreFull) else "server_error"
        own = isinstance(error, AdapterError | OSError)
        reason = str(error) if own else "the server failed; its log has the cause"
        fault = Fault(code, f"The job could not go on: {reason}")
        self._queue.fail(job.id, fault, before=("validating_files", "running"))

    def _surely(self, do: Callable[[], Any]) -> Any:
        """What the catalog gives; None while it fails (a full disk, a server that is away)."""
        try:
            return do()
        except AdapterError as error:
            logger.error("the queue of jobs cannot be used", reason=str(error))
            self._wait(IDLE_SECONDS)
            return None

    def _wait(self, seconds: float) -> None:
        with self._news:
            if not self._stopping:
                self._news.wait(seconds)

    def _sweep(self) -> None:
        """Directories of jobs that have no row: a crash came between the two. Those that were made
        since this server began may get theirs yet. And the data of jobs that are over."""
        for path in self._workshop.home.glob("ftjob-*"):
            if path.stat().st_mtime < self._began:
                try:
                    self._tidy(path.name)
                except NotFound:
                    shutil.rmtree(path, ignore_errors=True)

    # One job

    def _check(self, job: Job) -> None:
        directory = self._workshop.directory(job.id)
        try:
            shop = self._workshop
            prepare(job.order, directory, self._files, shop.base, shop.double_quant)
        except (OSError, NotFound) as error:
            fault = Fault("file_missing", f"Its files are not there: {error}", TRAINING)
            self._queue.fail(job.id, fault, before=("validating_files",))
            return
        data = TRAINING + job.order.training.suffix
        arguments = ("train", "check", data, "--config", CONFIG, "--json")
        process = TrainProcess(arguments, directory, self._workshop.confinement, self._held())
        status = self._attend(process, job, CHECK_SECONDS, "validating_files")
        said = process.said()
        process.close()
        if status is None:
            return
        self._judge(job, status, said)

    def _judge(self, job: Job, status: int, said: str) -> None:
        found = verdict(job.order, status, said)
        if isinstance(found, Fault):
            self._queue.fail(job.id, found, before=("validating_files",))
            return
        bounded = self._bounded(found)
        write_config(self._workshop.directory(job.id), bounded.config)
        self._queue.move(
            job.id,
            "queued",
            f"Files validated: {bounded.examples:,} examples, {bounded.tokens:,} tokens; "
            f"{bounded.config['optim']['steps']:,} steps. Queued.",  # type: ignore[index]
            before=("validating_files",),
            checked=bounded.to_json(),
        )
        self.wake()

    def _bounded(self, found: Checked) -> Checked:
        budget: dict[str, Any] = dict(found.config["budget"])  # type: ignore[call-overload]
        most = self._workshop.max_minutes
        budget["minutes"] = most if budget["minutes"] is None else min(most, budget["minutes"])
        return replace(found, config={**found.config, "budget": budget})

    def _run(self, job: Job) -> None:
        directory = self._workshop.directory(job.id)
        before = _last_step(directory)
        arguments = ("train", "run", CONFIG, "--continue")
        process = TrainProcess(arguments, directory, self._workshop.confinement, self._held())
        logger.info("job started", job=job.id, process=process.pid)
        began = time.monotonic()
        status = self._attend(process, job, None, "running")
        minutes = (time.monotonic() - began) / 60
        self._surely(partial(self._queue.trained, job.id, minutes))
        said = process.said()
        process.close()
        if _last_step(directory) > before:
            self._queue.set(job.id, starts=0)
            job = replace(job, starts=0)
        self._settle(job, directory, status, said)

    def _attend(
        self, process: TrainProcess, job: Job, seconds: float | None, during: str
    ) -> int | None:
        """The exit status of a process that is stopped when that is asked. None: it is not to be
        judged, because the job was taken from it or the server stops."""
        end = float("inf") if seconds is None else time.monotonic() + seconds
        while (status := process.poll()) is None:
            if self._stopping:
                process.end(self._stop_at - time.monotonic())
                return None if during == "validating_files" else STOPPED
            now = self._surely(lambda: self._queue.get(job.id))
            if now is not None and (now.asked or now.status != during):
                status = process.end(STOP_SECONDS if now.status == "running" else 0.0)
                return status if during == "running" else None
            if time.monotonic() > end:
                process.kill()
            with self._news:
                if not self._stopping and process.poll() is None:
                    self._news.wait(LOOK_SECONDS)
        return status

    def _settle(self, job: Job, directory: Path, status: int | None, said: str) -> None:
        """A process of training has ended: what becomes of its job."""
        now = self._queue.get(job.id)
        if now.asked == "cancel":
            self._queue.move(job.id, "cancelled", "Cancelled.", before=("running",))
        elif status == 0:
            self._finish(job, directory)
        elif now.asked == "pause":
            self._queue.move(job.id, "paused", _where(directory, "Paused"), before=("running",))
        elif self._stopping:
            why = _where(directory, "The server stops; queued again")
            self._queue.move(job.id, "queued", why, before=("running",))
        elif status is not None and (status < 0 or status == STOPPED) and job.starts < MOST_STARTS:
            why = _where(directory, f"{death(status)}; queued again")
            self._queue.move(job.id, "queued", why, before=("running",), level="warn")
        else:
            self._queue.fail(
                job.id, why_it_failed(job.order, status or 0, said), before=("running",)
            )

    def _finish(self, job: Job, directory: Path) -> None:
        ends = progress.happened(directory, "finished")
        done = ends[-1].data if ends else {}
        adapter, left = None, "; not published"
        level: Literal["info", "warn"] = "info"
        try:
            if job.order.publish:
                adapter = self._publication.publish(job, directory, done)
        except AdapterError as error:
            code = "store_full" if isinstance(error, StoreFull) else "publish_failed"
            fault = Fault(code, f"Trained, and the adapter was not published: {error}")
            self._queue.fail(job.id, fault, before=("running",))
            return
        except NotTrained as error:  # somebody took the name since it was ordered
            left, level = f"; not published: {error}", "warn"
        except ServiceError:
            if not self._stopping:  # else the engine, which was to try it, went first
                raise
            why = "Trained; the server stops before the adapter is published; queued again."
            self._queue.move(job.id, "queued", why, before=("running",))
            return
        said = f": {adapter} serves from now on" if adapter else left
        metrics = None
        try:
            metrics = step_metrics(job, directory, self._files)
        except QuotaReached as error:  # the adapter is there all the same
            said, level = f"{said}; its metrics are not kept: {error}", "warn"
        self._queue.move(
            job.id,
            "succeeded",
            f"Succeeded after {done.get('steps', 0):,} steps{said}.",
            before=("running",),
            level=level,
            adapter=adapter,
            trained_tokens=done.get("tokens"),
            result_file=metrics,
        )

    def _held(self) -> tuple[int, ...]:
        return () if self._lock is None else (self._lock,)


def _last_step(directory: Path) -> int:
    found = progress.happened(directory, "checkpoint")
    return max((one.data.get("step", 0) for one in found), default=0)


def _where(directory: Path, what: str) -> str:
    step = _last_step(directory)
    return (
        f"{what}, its checkpoint is of step {step:,}." if step else f"{what}, from its beginning."
    )
