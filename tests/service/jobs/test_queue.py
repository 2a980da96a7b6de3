"""Rows of jobs: who may move them, what a new server makes of them, pages of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.catalog import Catalog
from service.errors import NotFound, QuotaExceeded, WrongState
from service.jobs.files import TrainingFiles
from service.jobs.job import Checked, Fault, Status
from service.jobs.queue import Queue
from tests.service.jobs.conftest import keep, order_of


@pytest.fixture
def job_id(queue: Queue, files: TrainingFiles, tmp_path: Path) -> str:
    order = order_of(keep(files, tmp_path), config={"optim": {"steps": 3}}, metadata={"a": "b"})
    return queue.add(order).id


def test_a_job_comes_back_as_it_was_ordered(queue: Queue, job_id: str) -> None:
    job = queue.get(job_id)
    assert job.order.config == {"optim": {"steps": 3}}
    assert job.order.metadata == {"a": "b"}
    assert (job.status, job.error, job.checked) == ("validating_files", None, None)


def test_of_two_that_claim_a_job_one_gets_it(queue: Queue, job_id: str) -> None:
    queue.move(job_id, "queued", "checked", before=("validating_files",))
    first, second = queue.claim(), queue.claim()
    assert first is not None
    assert (first.id, first.status, first.starts) == (job_id, "running", 1)
    assert second is None
    assert not queue.move(job_id, "queued", "again", before=("validating_files",))


def test_another_home_sees_nothing_of_it(catalog: Catalog, job_id: str) -> None:
    other = Queue(catalog, "1" * 32)
    with pytest.raises(NotFound):
        other.get(job_id)
    assert other.newest(None, 10) == ([], False)
    assert other.next_in("validating_files") is None


@pytest.mark.parametrize("wrong", ["", "ftjob-1", "../../etc/passwd", "ftjob-" + "0" * 24])
def test_what_is_no_job_is_not_found(queue: Queue, wrong: str) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        queue.get(wrong)


@pytest.mark.parametrize(
    ("asked", "then"), [(None, "queued"), ("pause", "paused"), ("cancel", "cancelled")]
)
def test_what_ran_when_the_server_ended(
    queue: Queue, job_id: str, asked: str | None, then: Status
) -> None:
    queue.move(job_id, "running", "claimed", before=("validating_files",), starts=1)
    queue.set(job_id, asked=asked)
    assert queue.recover(3) == [job_id]
    job = queue.get(job_id)
    assert (job.status, job.asked) == (then, None)
    assert queue.notes(job_id)[-1].level == "warn"


def test_a_job_that_ends_the_server_each_time_is_not_started_for_ever(
    queue: Queue, job_id: str
) -> None:
    queue.move(job_id, "running", "claimed", before=("validating_files",), starts=3)
    queue.recover(3)
    job = queue.get(job_id)
    assert (job.status, job.error and job.error.code) == ("failed", "killed")


def test_a_failed_job_is_resumed_where_its_data_was_right(queue: Queue, job_id: str) -> None:
    fault = Fault("x", "why", "y")
    assert queue.fail(job_id, fault, before=("validating_files",))
    assert queue.get(job_id).error == fault
    with pytest.raises(WrongState):
        queue.resume(job_id)
    queue.set(job_id, checked=Checked({"optim": {}}, 1, 1).to_json())
    resumed = queue.resume(job_id)
    assert (resumed.status, resumed.error, resumed.finished) == ("queued", None, None)


def test_minutes_that_a_failed_job_gave_back_are_not_taken_twice(
    queue: Queue, files: TrainingFiles, tmp_path: Path
) -> None:
    acme = queue.of("acme")
    order = order_of(keep(files, tmp_path), config={"budget": {"minutes": 6.0}})
    first = acme.add(order, most_minutes=10.0)
    acme.set(first.id, checked=Checked({"optim": {}}, 1, 1).to_json())
    acme.fail(first.id, Fault("x", "why", "y"), before=("validating_files",))
    second = acme.add(order, most_minutes=10.0)
    with pytest.raises(QuotaExceeded, match="promised"):
        acme.resume(first.id, 10.0)
    assert acme.get(first.id).status == "failed"
    acme.cancel(second.id)
    assert acme.resume(first.id, 10.0).status == "queued"


def test_pages(queue: Queue, files: TrainingFiles, tmp_path: Path) -> None:
    ids = [queue.add(order_of(keep(files, tmp_path))).id for _ in range(5)]
    first, more = queue.newest(None, 2)
    assert ([job.id for job in first], more) == ([ids[4], ids[3]], True)
    rest, more = queue.newest(first[-1].id, 10)
    assert ([job.id for job in rest], more) == ([ids[2], ids[1], ids[0]], False)
    assert queue.counts()["validating_files"] == 5
