"""The life of a job, with a stand-in for the training itself: what ends it, and what goes on."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidAdapter, QuotaReached, StoreFull, StoreUnavailable
from service.errors import EngineFailed, NotTrained, WrongState
from service.jobs import progress
from service.jobs.directory import prepare
from service.jobs.job import Job
from service.jobs.office import Office
from service.jobs.runner import Workshop
from service.jobs.verdict import _bad_rows
from tests.service.jobs.conftest import Bench, keep, order_of


def begin(bench: Bench, tmp_path: Path, plan: dict[str, Any] | None = None, **order: Any) -> Job:
    bench.plan = plan or {}
    job = bench.queue.add(order_of(keep(bench.files, tmp_path), **order))
    bench.start()
    return job


def numbers(bench: Bench, job: Job) -> list[int]:
    return [step.number for step in progress.steps(bench.home / "jobs" / job.id)]


def test_from_its_files_to_an_adapter(bench: Bench, tmp_path: Path) -> None:
    job = bench.until(begin(bench, tmp_path, epochs=4), "succeeded", "failed")
    assert (job.status, job.adapter, job.trained_tokens) == ("succeeded", "made@1", 64)
    assert job.checked is not None
    assert job.checked.config["optim"]["steps"] == 8  # 4 epochs of 8 examples, 4 a batch
    assert job.checked.config["budget"]["minutes"] == 24 * 60
    assert numbers(bench, job) == list(range(1, 9))
    assert job.result_file is not None
    rows = bench.files.path(bench.files.get(job.result_file)).read_text().splitlines()
    assert rows[1] == "1,1.0,,0.1,8"
    assert len(rows) == 9
    told = " ".join(bench.messages(job))
    for said in ("Created", "8 examples, 64 tokens", "Started", "made@1 serves"):
        assert said in told


def test_what_is_not_to_be_published_is_not(bench: Bench, tmp_path: Path) -> None:
    job = bench.until(begin(bench, tmp_path, publish=False), "succeeded")
    assert (job.adapter, bench.published.jobs) == (None, [])


def test_what_was_not_published_can_be_later(bench: Bench, tmp_path: Path) -> None:
    workshop = Workshop(bench.home / "jobs", "a base")
    published: Any = bench.published
    office = Office(bench.queue, bench.files, workshop, published, 8)
    job = begin(bench, tmp_path, {"holds_at": 1}, publish=False)
    bench.step(job, 1)
    with pytest.raises(WrongState, match="only what succeeded"):
        office.publish(job.id)
    bench.go(job)
    bench.until(job, "succeeded")
    bench.published.error = InvalidAdapter("not finite", "lora_A")
    with pytest.raises(InvalidAdapter):
        office.publish(job.id)
    bench.published.error = None
    assert bench.queue.get(job.id).adapter is None
    assert office.publish(job.id).adapter == "made@1"
    assert office.publish(job.id).adapter == "made@1"
    assert bench.published.jobs == [job.id], "once"
    assert bench.messages(job)[-1] == "Published: made@1 serves from now on."
    shutil.rmtree(bench.home / "jobs" / job.id)
    bench.queue.set(job.id, adapter=None)
    with pytest.raises(WrongState, match="no adapter on this server"):
        office.publish(job.id)


def test_a_name_that_was_taken_meanwhile_keeps_what_was_trained(
    bench: Bench, tmp_path: Path
) -> None:
    bench.published.error = NotTrained("made")
    job = bench.until(begin(bench, tmp_path), "succeeded")
    assert job.adapter is None
    assert "not published: adapter 'made' was not made by a training" in bench.messages(job)[-1]
    bench.published.error = None
    office = Office(
        bench.queue,
        bench.files,
        Workshop(bench.home / "jobs", "a base"),
        bench.published,  # type: ignore[arg-type]
        8,
    )
    assert office.publish(job.id, replaces=True).adapter == "made@1"
    assert bench.published.replaced == [False, True]


def test_bad_rows_end_it_with_their_line_and_field(bench: Bench, tmp_path: Path) -> None:
    report = {"bad": 1, "rejects": ["training_file.jsonl:3: prompt: a text is needed"]}
    job = bench.until(begin(bench, tmp_path, {"report": report}), "failed")
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_data", "training_file")
    assert f"training_file {job.order.training.id}:3: prompt:" in job.error.message
    with pytest.raises(WrongState, match="before it could start"):
        bench.queue.resume(job.id)


def test_bad_rows_that_are_alike_are_said_once() -> None:
    rejects = [f"a.jsonl:{n}: fields ['question']" for n in (1, 2, 3)] + ["a.jsonl:4: no text"]
    said = _bad_rows({"path": "a.jsonl", "rows": 9, "bad": 7, "rejects": rejects}, 0)
    rows = "a.jsonl:1: fields ['question'] (and 2 like it); a.jsonl:4: no text; and 3 more"
    assert said == f"7 of 9 rows are bad (data.max_bad_rows is 0): {rows}"


def test_a_file_that_the_disk_lost_ends_it(bench: Bench, tmp_path: Path) -> None:
    file = keep(bench.files, tmp_path)
    bench.files.path(file).unlink()
    job = bench.queue.add(order_of(file))
    bench.start()
    job = bench.until(job, "failed")
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("file_missing", "training_file")


def test_a_file_that_is_deleted_meanwhile_is_still_there_for_the_job(
    bench: Bench, tmp_path: Path
) -> None:
    job = begin(bench, tmp_path, {"holds_at": 1})
    bench.step(job, 1)
    assert bench.queue.get(job.id).status == "running"
    bench.files.delete(job.order.training.id)
    bench.go(job)
    assert bench.until(job, "succeeded", "failed").status == "succeeded"


def data_of(bench: Bench, job: Job) -> list[str]:
    """What of a job's directory only a run needs."""
    found = (bench.home / "jobs" / job.id).rglob("*")
    return sorted(one.name for one in found if one.suffix in (".jsonl", ".safetensors"))


def test_a_job_that_is_over_holds_no_data(bench: Bench, tmp_path: Path) -> None:
    """Else who deletes its files and cancels it keeps them on the disk for ever."""
    done = begin(bench, tmp_path, {"holds_at": 1})
    bench.step(done, 1)
    assert "training_file.jsonl" in data_of(bench, done)
    bench.go(done)
    bench.until(done, "succeeded")
    bench.when(lambda: data_of(bench, done) == ["events.jsonl", "log.jsonl"])
    bench.stop()
    queued = bench.queue.add(done.order)
    prepare(queued.order, bench.home / "jobs" / queued.id, bench.files, "a base")
    published: Any = bench.published
    office = Office(bench.queue, bench.files, Workshop(bench.home / "jobs", "b"), published, 8)
    office.pause(queued.id)
    assert data_of(bench, queued) == ["training_file.jsonl"], "it may go on"
    office.cancel(queued.id)
    assert data_of(bench, queued) == []
    prepare(queued.order, bench.home / "jobs" / queued.id, bench.files, "a base")
    bench.start()  # a server that was ended before it let go
    bench.when(lambda: data_of(bench, queued) == [])
    failed = bench.queue.add(done.order)
    bench.restart(report={"bad": 1, "rejects": ["training_file.jsonl:3: prompt"]})
    bench.until(failed, "failed")
    bench.when(lambda: data_of(bench, failed) == [])


def test_a_job_whose_metrics_have_no_room_has_succeeded_all_the_same(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise QuotaReached("tenant 'acme' may keep 8 bytes")

    monkeypatch.setattr("service.jobs.runner.step_metrics", full)
    job = bench.until(begin(bench, tmp_path), "succeeded", "failed")
    assert (job.status, job.adapter, job.result_file) == ("succeeded", "made@1", None)
    assert "made@1 serves from now on; its metrics are not kept: tenant" in bench.messages(job)[-1]


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(bench: Bench, tmp_path: Path) -> None:
    job = bench.until(begin(bench, tmp_path, {"dies_at": 5}), "succeeded", "failed")
    assert job.status == "succeeded"
    assert numbers(bench, job) == list(range(1, 9))
    starts = progress.happened(bench.home / "jobs" / job.id, "started")
    assert [one.data["step"] for one in starts] == [0, 4]
    assert any("signal 9" in message and "step 4" in message for message in bench.messages(job))


def test_a_run_that_is_killed_again_and_again_ends_with_the_reason(
    bench: Bench, tmp_path: Path
) -> None:
    job = begin(bench, tmp_path, {"dies_at": 1, "always": True})
    job = bench.until(job, "failed")
    assert job.error is not None
    assert job.error.code == "killed"
    assert "3 times" in job.error.message


@pytest.mark.parametrize(
    ("says", "status", "code", "reason"),
    [
        ("refused: method vera: no layer fits", 2, "refused", "no layer fits"),
        ("Traceback\nRuntimeError: can't allocate memory", 1, "out_of_memory", "batch_size"),
        ("OSError: [Errno 28] No space left on device", 1, "store_full", "disk is full"),
        ("Traceback\nValueError: odd", 1, "training_failed", "ValueError: odd"),
    ],
)
def test_why_a_run_failed_is_told(
    bench: Bench, tmp_path: Path, says: str, status: int, code: str, reason: str
) -> None:
    job = begin(bench, tmp_path, {"says": says, "exit": status})
    job = bench.until(job, "failed", "succeeded")
    assert job.error is not None
    assert job.error.code == code
    assert reason in job.error.message


def test_pause_and_resume(bench: Bench, tmp_path: Path) -> None:
    job = begin(bench, tmp_path, {"holds_at": 3})
    bench.step(job, 3)
    assert bench.queue.pause(job.id).status in ("running", "paused")
    job = bench.until(job, "paused", "succeeded")
    assert job.status == "paused"
    assert job.asked is None
    assert numbers(bench, job) == [1, 2, 3]
    bench.queue.resume(job.id)
    assert bench.until(job, "succeeded", "failed").status == "succeeded"
    starts = progress.happened(bench.home / "jobs" / job.id, "started")
    assert [one.data["step"] for one in starts] == [0, 3]
    with pytest.raises(WrongState, match="succeeded"):
        bench.queue.pause(job.id)


def test_cancel_ends_what_runs_and_what_waits(bench: Bench, tmp_path: Path) -> None:
    job = begin(bench, tmp_path, {"holds_at": 2})
    waiting = bench.queue.add(order_of(keep(bench.files, tmp_path)))
    bench.step(job, 2)
    bench.until(waiting, "queued")
    assert bench.queue.cancel(waiting.id).status == "cancelled"
    bench.queue.cancel(job.id)
    assert bench.until(job, "cancelled", "succeeded").status == "cancelled"
    assert bench.published.jobs == []
    with pytest.raises(WrongState, match="nothing to cancel"):
        bench.queue.cancel(job.id)


def test_a_check_that_is_cancelled_ends_at_once(bench: Bench, tmp_path: Path) -> None:
    job = begin(bench, tmp_path, {"check_seconds": 30})
    bench.when(lambda: (bench.home / "jobs" / job.id / "output.txt").exists())
    assert bench.queue.cancel(job.id).status == "cancelled"
    bench.stop()
    assert bench.queue.get(job.id).status == "cancelled"


def test_one_job_at_a_time_in_order(bench: Bench, tmp_path: Path) -> None:
    jobs = [bench.queue.add(order_of(keep(bench.files, tmp_path))) for _ in range(3)]
    bench.plan = {"seconds": 0.01}
    bench.start()
    for job in jobs:
        bench.until(job, "succeeded")
        assert bench.queue.counts()["running"] <= 1
    assert bench.published.jobs == [job.id for job in jobs]


def test_a_server_that_stops_lets_its_job_go_on_at_the_next_start(
    bench: Bench, tmp_path: Path
) -> None:
    job = begin(bench, tmp_path, {"holds_at": 3})
    bench.step(job, 3)
    bench.stop()
    assert bench.queue.get(job.id).status == "queued"
    assert numbers(bench, job) == [1, 2, 3]
    bench.restart()
    assert bench.until(job, "succeeded", "failed").status == "succeeded"
    starts = progress.happened(bench.home / "jobs" / job.id, "started")
    assert [one.data["step"] for one in starts] == [0, 3]


def test_a_job_that_ran_when_the_server_was_killed_is_queued_again(
    bench: Bench, tmp_path: Path
) -> None:
    job = bench.queue.add(order_of(keep(bench.files, tmp_path)))
    assert bench.queue.move(job.id, "queued", "as a check would", before=("validating_files",))
    assert bench.queue.claim() is not None  # and then the power went
    bench.start()
    bench.when(lambda: any("server ended" in told for told in bench.messages(job)))


def test_a_second_server_on_one_home_runs_nothing(bench: Bench, tmp_path: Path) -> None:
    first = bench.start()
    bench.when(lambda: first._lock is not None)
    other = bench.start()
    job = bench.queue.add(order_of(keep(bench.files, tmp_path)))
    bench.until(job, "succeeded")
    assert other._lock is None
    first.stop(1)
    bench.when(lambda: other._lock is not None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidAdapter("not finite", "lora_A"), "publish_failed"),
        (StoreFull("the disk is full"), "store_full"),
        (EngineFailed("the engine stopped"), "server_error"),
    ],
)
def test_what_cannot_be_published_says_why_and_can_be_tried_again(
    bench: Bench, tmp_path: Path, error: Exception, code: str
) -> None:
    bench.published.error = error
    job = bench.until(begin(bench, tmp_path), "failed", "succeeded")
    assert job.error is not None
    assert job.error.code == code
    bench.published.error = None
    bench.queue.resume(job.id)
    assert bench.until(job, "succeeded").adapter == "made@1"


def test_a_directory_without_a_row_is_swept(bench: Bench) -> None:
    left = bench.home / "jobs" / f"ftjob-{'0' * 24}"
    left.mkdir(parents=True)
    (left / "job.json").write_text(json.dumps({}))
    os.utime(left, (0, 0))
    fresh = bench.home / "jobs" / f"ftjob-{'1' * 24}"
    fresh.mkdir()
    os.utime(fresh, (time.time() + 60, time.time() + 60))
    bench.start()
    bench.when(lambda: not left.exists())
    assert fresh.exists(), "its row may be on its way"


def test_a_catalog_that_fails_costs_no_job_its_directory(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.until(begin(bench, tmp_path), "succeeded")
    directory = bench.home / "jobs" / job.id
    os.utime(directory, (0, 0))
    bench.stop()

    def away(job_id: str) -> Job:
        raise StoreUnavailable("the catalog is away")

    with monkeypatch.context() as patch:
        patch.setattr(bench.queue, "get", away)
        runner = bench.start()
        bench.when(lambda: len(runner._threads) > 1)
    assert directory.exists()
