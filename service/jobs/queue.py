"""The queue: jobs as rows of the catalog, so that it survives whatever the server does not.

Every change of a job's state is one transaction that names the state it expects: of two that want
to move a job, one does. Tenants take turns, and leave room for each other.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import sqlalchemy as sa

from adapters.catalog import Catalog
from adapters.manifest import DEFAULT_TENANT
from adapters.room import several
from adapters.tables import job_events as events
from adapters.tables import training_jobs as jobs
from service.errors import NotFound, Overloaded, QuotaExceeded, WrongState
from service.jobs.files import page
from service.jobs.job import ENDED, JOB_ID, STATUSES, Asked, Checked, Fault, Job, Status, new_job_id
from service.jobs.order import Order

Level = Literal["info", "warn", "error"]
DAY = 24 * 3600.0
MONTH = 30 * DAY
PLANS = "plans"  # in place of a server, whose ids are hexadecimal
FULL_SECONDS = 60.0  # after which to try again


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened to a job. Numbers grow with time."""

    number: int
    created: float
    level: Level
    message: str


class Queue:
    """The jobs of one server: of one tenant (`of`), or of all. Thread-safe; raises
    StoreUnavailable or StoreFull."""

    def __init__(self, catalog: Catalog, home: str) -> None:
        self._catalog = catalog
        self._home = home
        self._tenant: str | None = None
        self._turns = itertools.count(1)
        self._last: dict[tuple[Status, str], int] = {}  # turn of a tenant

    def of(self, tenant: str) -> Queue:
        """Those of one tenant; another's are not there. The line that they stand in is one."""
        found = copy(self)
        found._tenant = tenant
        return found

    def add(
        self,
        order: Order,
        job_id: str | None = None,
        most_minutes: float | None = None,
        most_jobs: int | None = None,
    ) -> Job:
        """`most_minutes`: what the tenant's jobs of thirty days may train, this one's budget among
        them; `most_jobs` as of `check_line`. Raises QuotaExceeded, Overloaded."""
        tenant = self._tenant or DEFAULT_TENANT
        job = Job(job_id or new_job_id(), "validating_files", time.time(), order, tenant=tenant)
        with self._catalog.writing() as connection:  # others may have come since it was looked at
            if most_jobs is not None:
                self._check_line(connection, most_jobs)
            if most_minutes is not None:
                promised = self._minutes(connection, job.created - MONTH)
                if promised + order.config["budget"]["minutes"] > most_minutes + 1e-6:
                    raise minutes_used()
            connection.execute(
                sa.insert(jobs).values(
                    id=job.id,
                    home=self._home,
                    tenant=tenant,
                    status=job.status,
                    created=job.created,
                    starts=0,
                    ordered=order.to_json(),
                )
            )
            _note(connection, job.id, "info", "Created; its files are being validated.")
        return job

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        row = None
        if JOB_ID.fullmatch(job_id):
            query = self._mine().where(jobs.c.id == job_id)
            with self._catalog.reading() as connection:
                row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"job {job_id[:80]!r} does not exist", "fine_tuning_job_id")
        return _job(row)

    def newest(self, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """Jobs, the newest first, after the one with id `after`; and whether there are more."""
        with self._catalog.reading() as connection:
            rows = connection.execute(page(self._mine(), jobs, after, limit, "desc")).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def counts(self) -> dict[Status, int]:
        """How many jobs, of all tenants, are in each state."""
        query = sa.select(jobs.c.status, sa.func.count()).where(jobs.c.home == self._home)
        with self._catalog.reading() as connection:
            rows = connection.execute(query.group_by(jobs.c.status)).all()
        found = {row[0]: row[1] for row in rows}
        return {status: found.get(status, 0) for status in STATUSES}

    def check_line(self, most: int) -> None:
        """Raise where the tenant may not have one job more that has not ended: Overloaded where
        all tenants have `most`; QuotaExceeded where there are several tenants, and this one has as
        many as are left for others."""
        with self._catalog.reading() as connection:
            self._check_line(connection, most)

    def _check_line(self, connection: sa.Connection, most: int) -> None:
        mine = jobs.c.tenant == (self._tenant or DEFAULT_TENANT)
        query = sa.select(sa.func.count(), sa.func.count(sa.case((mine, 1))))
        query = query.where(jobs.c.home == self._home, jobs.c.status.not_in(ENDED))
        waiting, own = connection.execute(query).one()
        if waiting >= most:
            what = f"{waiting} jobs have not ended, {most} may (max_jobs): cancel some"
            raise Overloaded(what, FULL_SECONDS)
        if own >= most - waiting and several(connection):
            raise QuotaExceeded(
                f"{waiting} jobs have not ended, {own} of them yours, {most} may (max_jobs): what "
                "is left is for other tenants; cancel some",
                FULL_SECONDS,
            )

    def minutes(self, since: float) -> float:
        """What the tenant's jobs created since a time, on all servers, have trained, or may still
        train, and what its plans took."""
        with self._catalog.reading() as connection:
            return self._minutes(connection, since)

    def _minutes(self, connection: sa.Connection, since: float) -> float:
        whose = jobs.c.tenant == (self._tenant or DEFAULT_TENANT)
        rows = connection.execute(sa.select(jobs).where(whose, jobs.c.created >= since)).all()
        return sum(row.minutes if row.status in ENDED else _allowed(row) for row in rows)

    @contextmanager
    def planning(self, most_minutes: float, seconds: float) -> Iterator[float]:
        """Let a plan be made, which tries steps: the seconds that it may take, of these and of what
        the tenant has left. What it takes counts as trained. Raises QuotaExceeded."""
        now = time.time()
        with self._catalog.writing() as connection:
            left = most_minutes - self._minutes(connection, now - MONTH)
            if left <= 0:
                raise minutes_used()
            taken = min(left, seconds / 60)
            day = self._add_plan(connection, now, taken)
        begun = time.monotonic()
        try:
            yield taken * 60
        finally:
            self.trained(day, (time.monotonic() - begun) / 60 - taken)

    def _add_plan(self, connection: sa.Connection, now: float, minutes: float) -> str:
        """Note minutes of a plan. A tenant's plans of a day are one row, which is no server's, so
        that it is no job."""
        tenant = self._tenant or DEFAULT_TENANT
        day = f"plan-{sha256(tenant.encode()).hexdigest()[:24]}-{int(now // DAY)}"
        change = sa.update(jobs).where(jobs.c.id == day).values(minutes=jobs.c.minutes + minutes)
        if connection.execute(change).rowcount == 0:
            nothing = {"status": "succeeded", "starts": 0, "ordered": "{}"}
            row = {"id": day, "home": PLANS, "tenant": tenant, "created": now, **nothing}
            connection.execute(sa.insert(jobs).values(**row, finished=now, minutes=minutes))
        return day

    def trained(self, job_id: str, minutes: float) -> None:
        """So much more was trained."""
        change = sa.update(jobs).where(jobs.c.id == job_id)
        with self._catalog.writing() as connection:
            connection.execute(change.values(minutes=jobs.c.minutes + minutes))

    def next_in(self, status: Status) -> Job | None:
        """The job in a state whose turn it is: of the tenant that has the fewest running, of these
        the one whose last turn was longest ago, and of that one the oldest."""
        ordered = self._mine().order_by(jobs.c.created, jobs.c.id)
        with self._catalog.reading() as connection:
            rows = connection.execute(ordered.where(jobs.c.status.in_((status, "running")))).all()
        running = Counter(row.tenant for row in rows if row.status == "running")

        def turn(row: Any) -> tuple[int, int]:  # `min` takes the first of equals
            return running[row.tenant], self._last.get((status, row.tenant), 0)

        row = min((row for row in rows if row.status == status), key=turn, default=None)
        if row is None:
            return None
        self._last[status, row.tenant] = next(self._turns)
        return _job(row)

    def move(
        self,
        job_id: str,
        to: Status,
        message: str,
        *,
        before: Iterable[Status],
        level: Level = "info",
        most_minutes: float | None = None,
        most_jobs: int | None = None,
        **fields: Any,
    ) -> bool:
        """Bring a job from one of the states `before` to another; False where it is in none.

        `fields` are columns to set with it. What was asked of the job has then happened.
        `most_minutes`: what the tenant's jobs may train, this one in its new state among them;
        `most_jobs`: as of `check_line`, for one that had ended. Raises QuotaExceeded, Overloaded.
        """
        ended = {"finished": time.time()} if to in ENDED else {}
        change = (
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.home == self._home)
            .where(jobs.c.status.in_(list(before)))
            .values(status=to, asked=None, **ended, **fields)
        )
        with self._catalog.writing() as connection:
            if most_jobs is not None:
                self._check_line(connection, most_jobs)
            if connection.execute(change).rowcount == 0:
                return False
            if most_minutes is not None:
                since = time.time() - MONTH
                if self._minutes(connection, since) > most_minutes + 1e-6:
                    raise minutes_used()
            _note(connection, job_id, level, message)
        return True

    def claim(self) -> Job | None:
        """The queued job whose turn it is, which is running from now on."""
        while (job := self.next_in("queued")) is not None:
            started = self.move(
                job.id, "running", "Started.", before=("queued",), starts=job.starts + 1
            )
            if started:
                return self.get(job.id)
        return None

    def fail(self, job_id: str, fault: Fault, before: Iterable[Status]) -> bool:
        return self.move(
            job_id, "failed", fault.message, before=before, level="error", error=fault.to_json()
        )

    def set(self, job_id: str, **fields: Any) -> None:
        """Set columns that are no state."""
        with self._catalog.writing() as connection:
            mine = (jobs.c.id == job_id, jobs.c.home == self._home)
            connection.execute(sa.update(jobs).where(*mine).values(**fields))

    def asked(self, job_id: str) -> Asked | None:
        """What is asked of a running job."""
        query = sa.select(jobs.c.asked).where(jobs.c.id == job_id)
        with self._catalog.reading() as connection:
            found: Asked | None = connection.execute(query).scalar()
        return found

    def cancel(self, job_id: str) -> Job:
        """Cancelled at once where no process runs for it; else that is asked for.

        Raises NotFound, WrongState.
        """
        return self._ask(job_id, "cancel", "cancelled", "Cancelled.")

    def pause(self, job_id: str) -> Job:
        """As `cancel`, but it can go on from its last checkpoint."""
        return self._ask(job_id, "pause", "paused", "Paused.")

    def resume(
        self, job_id: str, most_minutes: float | None = None, most_jobs: int | None = None
    ) -> Job:
        """Queue a paused job again, or a failed one whose data was right: what that one had given
        back, its minutes and its place among `most_jobs`, has to be there still.

        Raises NotFound, WrongState, QuotaExceeded, Overloaded.
        """
        job = self.get(job_id)
        if job.status == "failed" and job.over:
            raise WrongState(f"{job_id} failed before it could start: create another job")
        again = self.move(
            job_id,
            "queued" if job.checked else "validating_files",
            "Queued again; it goes on from its last checkpoint.",
            before=("paused", "failed"),
            most_minutes=most_minutes,
            most_jobs=most_jobs if job.ended else None,
            error=None,
            finished=None,
            starts=0,
        )
        if not again:
            raise WrongState(f"{job_id} is {job.status}: only a paused or failed job is resumed")
        return self.get(job_id)

    def recover(self, most_starts: int) -> list[str]:
        """At start: what ran when the server ended is queued again, but for a job that was started
        `most_starts` times without a step in between: it may be what ended the server. The ids."""
        with self._catalog.reading() as connection:
            query = self._mine().where(jobs.c.status == "running")
            left = [_job(row) for row in connection.execute(query)]
        for job in left:
            if job.asked is None and job.starts >= most_starts:
                why = f"The server ended {job.starts} times while it ran, with no step in between."
                self.fail(job.id, Fault("killed", why), before=("running",))
                continue
            to: Status = {"cancel": "cancelled", "pause": "paused", None: "queued"}[job.asked]  # type: ignore[assignment]
            message = "The server ended while it ran" + (
                "; queued again, it goes on from its last checkpoint."
                if to == "queued"
                else f"; {to}, as was asked."
            )
            self.move(job.id, to, message, before=("running",), level="warn")
        return [job.id for job in left]

    def note(self, job_id: str, level: Level, message: str) -> None:
        with self._catalog.writing() as connection:
            _note(connection, job_id, level, message)

    def notes(self, job_id: str, after: int = 0) -> list[Note]:
        """What happened to a job, oldest first, after the note of this number."""
        query = sa.select(events).where(events.c.job == job_id, events.c.number > after)
        with self._catalog.reading() as connection:
            rows = connection.execute(query.order_by(events.c.number)).all()
        return [Note(row.number, row.created, row.level, row.message) for row in rows]

    def _ask(self, job_id: str, asked: Asked, to: Status, message: str) -> Job:
        job = self.get(job_id)
        if not self.move(job_id, to, message, before=("validating_files", "queued", "paused")):
            change = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.status == "running")
            with self._catalog.writing() as connection:
                done = connection.execute(change.values(asked=asked)).rowcount
                if done:
                    _note(connection, job_id, "info", f"Asked to {asked}; its step ends first.")
            if not done:
                raise WrongState(f"{job_id} ended as {job.status}: there is nothing to {asked}")
        return self.get(job_id)

    def _mine(self) -> sa.Select[Any]:
        mine = sa.select(jobs).where(jobs.c.home == self._home)
        return mine if self._tenant is None else mine.where(jobs.c.tenant == self._tenant)


def minutes_used() -> QuotaExceeded:
    return QuotaExceeded(
        "the minutes of training that this tenant has in thirty days are used, or promised to "
        "jobs that have not ended",
        3600.0,
    )


def _note(connection: sa.Connection, job_id: str, level: Level, message: str) -> None:
    connection.execute(
        sa.insert(events).values(job=job_id, created=time.time(), level=level, message=message)
    )


def _allowed(row: Any) -> float:
    budget = Order.from_json(row.ordered).config.get("budget") or {}
    return float(max(row.minutes, budget.get("minutes") or 0.0))


def _job(row: Any) -> Job:
    return Job(
        id=row.id,
        status=row.status,
        created=row.created,
        order=Order.from_json(row.ordered),
        asked=row.asked,
        finished=row.finished,
        starts=row.starts,
        checked=None if row.checked is None else Checked(**json.loads(row.checked)),
        error=None if row.error is None else Fault(**json.loads(row.error)),
        adapter=row.adapter,
        trained_tokens=row.trained_tokens,
        result_file=row.result_file,
        tenant=row.tenant,
    )
