"""What HTTP asks of training jobs: files, orders, plans, and what became of them."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.blobs import disk_errors
from service.errors import InvalidRequest, Overloaded, WrongState
from service.jobs import progress
from service.jobs.directory import CONFIG, drop_data, prepare
from service.jobs.files import TrainingFiles
from service.jobs.history import Event, follow, history, page
from service.jobs.job import Job, new_job_id
from service.jobs.order import OUT, Order, named, refusal, settled
from service.jobs.process import answer
from service.jobs.publication import Publication
from service.jobs.queue import MONTH, Queue, minutes_used
from service.jobs.runner import Runner, Workshop
from service.jobs.verdict import why_it_failed

CONFIG_SECONDS = 60.0
PLAN_SECONDS = 600.0
PLAN = "plan-"  # directories of plans, which live as long as the request


class Office:
    """The jobs of one server. Methods block, and raise ServiceError and AdapterError."""

    def __init__(
        self,
        queue: Queue,
        files: TrainingFiles,
        workshop: Workshop,
        publication: Publication,
        max_jobs: int,
    ) -> None:
        self.files = files
        self.queue = queue
        self._workshop = workshop
        self._max_jobs = max_jobs
        self._publication = publication
        self._publishing = threading.Lock()
        self._runner = Runner(queue, files, workshop, publication)

    def of(self, tenant: str) -> Office:
        """As this tenant sees it: its own files and jobs."""
        found = copy(self)
        found.files, found.queue = self.files.of(tenant), self.queue.of(tenant)
        return found

    def start(self) -> None:
        for left in self._workshop.home.glob(f"{PLAN}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._runner.start()

    def ask_to_stop(self, seconds: float) -> None:
        """Have what runs write a checkpoint and end; at once."""
        self._runner.ask_to_stop(seconds)

    def stop(self, seconds: float) -> None:
        self._runner.stop(seconds)

    def create(self, order: Order, most_minutes: int | None = None) -> Job:
        """Queue a job, once the schema has let its config pass.

        `most_minutes` is what its tenant may train in thirty days: the job gets what is left.
        Raises InvalidRequest, NotFound, Overloaded, QuotaExceeded.
        """
        self.queue.check_line(self._max_jobs)
        if most_minutes is not None:
            order = within(order, most_minutes - self.queue.minutes(time.time() - MONTH))
        job_id = new_job_id()
        shop = self._workshop
        directory = shop.directory(job_id)
        try:
            prepare(order, directory, self.files, shop.base, shop.double_quant)
            self._ask(order, directory, ("train", "config", CONFIG, "--json"), CONFIG_SECONDS)
            job = self.queue.add(order, job_id, most_minutes, self._max_jobs)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self._runner.wake()
        return job

    def plan(self, order: Order, most_minutes: int | None = None) -> dict[str, Any]:
        """What a job would do and cost, by trying, which takes of the tenant's minutes; nothing is
        kept. Raises as `create`."""
        shop = self._workshop
        with self._temporary() as directory, ExitStack() as stack:
            prepare(order, directory, self.files, shop.base, shop.double_quant)
            seconds = PLAN_SECONDS
            if most_minutes is not None:
                seconds = stack.enter_context(self.queue.planning(most_minutes, seconds))
            try:
                asked = ("train", "plan", CONFIG, "--json")
                found = self._ask(order, directory, asked, seconds)
            except Overloaded as error:
                if seconds < PLAN_SECONDS:
                    raise minutes_used() from error
                raise
        train = found["data"][0]
        config = settled(order, found["config"], train["examples"], train["tokens"])
        plan = dict(found["plan"])
        plan["steps"] = config["optim"]["steps"]
        plan["seconds"] = plan["seconds_per_step"] * plan["steps"]
        plan["epochs"] = plan["epochs"] * plan["steps"] / found["config"]["optim"]["steps"]
        return {
            "plan": plan,
            "config": shown(config),
            "data": [_report(order, one) for one in found["data"]],
        }

    def cancel(self, job_id: str) -> Job:
        job = self.queue.cancel(job_id)
        if job.over:  # else it runs, and its runner does this when it has ended
            with disk_errors("cannot remove the data of a job"):
                drop_data(self.directory(job))
        return self._told(job)

    def pause(self, job_id: str) -> Job:
        return self._told(self.queue.pause(job_id))

    def resume(self, job_id: str, most_minutes: float | None = None) -> Job:
        return self._told(self.queue.resume(job_id, most_minutes, self._max_jobs))

    def publish(self, job_id: str, *, replaces: bool = False) -> Job:
        """Serve the adapter of a job that was not to publish it; published already, as it is.
        `replaces`: also in place of what was uploaded under its name.

        Raises NotFound, WrongState, AdapterError, NotTrained.
        """
        with self._publishing:
            job = self.queue.get(job_id)
            if job.status != "succeeded":
                raise WrongState(f"{job_id} is {job.status}: only what succeeded is published")
            if job.adapter is not None:
                return job
            directory = self.directory(job)
            if not (directory / OUT).is_dir():
                raise WrongState(f"{job_id} has left no adapter on this server: train it again")
            ends = progress.happened(directory, "finished")
            done = ends[-1].data if ends else {}
            order = replace(job.order, replaces=replaces)
            adapter = self._publication.publish(replace(job, order=order), directory, done)
            self.queue.set(job_id, adapter=adapter)
            self.queue.note(job_id, "info", f"Published: {adapter} serves from now on.")
            return self.queue.get(job_id)

    def events(self, job_id: str, after: str | None, limit: int) -> tuple[list[Event], bool]:
        """The newest first."""
        job = self.queue.get(job_id)
        return page(history(self.queue, job, self.directory(job)), after, limit)

    def follow(self, job: Job) -> AsyncIterator[Event]:
        """Each event as it happens."""
        return follow(self.queue, job.id, self.directory(job), lambda: self._runner.stopping)

    def checkpoints(self, job: Job) -> list[tuple[progress.Happened, progress.Step | None]]:
        """The moments that a job could go on from, each with its step, the newest first; of a step
        that was run again the last one."""
        directory = self.directory(job)
        steps = {step.number: step for step in progress.steps(directory)}
        kept = {one.data["step"]: one for one in progress.happened(directory, "checkpoint")}
        return [(kept[step], steps.get(step)) for step in sorted(kept, reverse=True)]

    def directory(self, job: Job) -> Path:
        return self._workshop.directory(job.id)

    def _told(self, job: Job) -> Job:
        self._runner.wake()
        return job

    def _ask(
        self, order: Order, directory: Path, arguments: tuple[str, ...], seconds: float
    ) -> dict[str, Any]:
        """The document that a command prints. Raises InvalidRequest where it refuses the order."""
        try:
            status, found, said = answer(
                arguments, directory, self._workshop.confinement, seconds=seconds
            )
        except TimeoutError as error:
            raise Overloaded(f"the server is too busy for that: {error}", 60.0) from None
        refused = (found or {}).get("error")
        if refused is not None:
            raise InvalidRequest(*refusal(order, refused))
        if found is None:
            fault = why_it_failed(order, status, said)
            raise InvalidRequest(fault.message, fault.param)
        whole: dict[str, Any] = found
        return whole

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        directory = self._workshop.home / f"{PLAN}{secrets.token_hex(8)}"
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def within(order: Order, minutes: float) -> Order:
    """The order with so many minutes at most. Raises QuotaExceeded where none are left."""
    if minutes <= 0:
        raise minutes_used()
    budget = dict(order.config.get("budget") or {})
    budget["minutes"] = min(minutes, budget.get("minutes") or minutes)
    return replace(order, config={**order.config, "budget": budget})


def shown(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved config as a client sees it: without the paths of this machine."""
    found = {key: value for key, value in config.items() if key not in ("base", "out", "publish")}
    data = {k: v for k, v in found["data"].items() if k not in ("train", "eval", "template")}
    return {**found, "data": data}


def _report(order: Order, report: dict[str, Any]) -> dict[str, Any]:
    rejects = [named(order, line) for line in report["rejects"]]
    return {**report, "path": named(order, report["path"]), "rejects": rejects}
