"""Jobs and files of tenants: one line, where everybody sees their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.catalog import Catalog
from service.access.keys import Keys
from service.errors import NotFound, Overloaded, QuotaExceeded
from service.jobs.files import TrainingFiles
from service.jobs.job import Checked, Fault, Status
from service.jobs.order import Order
from service.jobs.queue import Queue
from tests.service.jobs.conftest import keep, order_of


def test_files(files: TrainingFiles, tmp_path: Path) -> None:
    kept = keep(files.of("acme"), tmp_path)
    assert files.of("acme").get(kept.id) == kept
    assert files.get(kept.id) == kept  # the runner's: of all tenants
    zeta = files.of("zeta")
    for do in (zeta.get, zeta.delete):
        with pytest.raises(NotFound) as refused:
            do(kept.id)
        assert str(refused.value) == f"file {kept.id!r} does not exist"
    assert zeta.list(limit=9, order="asc") == ([], False)
    assert files.path(kept).is_file()
    files.sweep()
    assert files.path(kept).is_file()


def test_jobs(queue: Queue, files: TrainingFiles, tmp_path: Path) -> None:
    order = order_of(keep(files.of("acme"), tmp_path))
    job = queue.of("acme").add(order)
    assert (job.tenant, queue.get(job.id).tenant) == ("acme", "acme")
    assert queue.add(order).tenant == "default"
    zeta = queue.of("zeta")
    for do in (zeta.get, zeta.cancel, zeta.pause, zeta.resume):
        with pytest.raises(NotFound) as refused:
            do(job.id)
        assert str(refused.value) == f"job {job.id!r} does not exist"
    assert zeta.newest(None, 9) == ([], False)
    assert [one.id for one in queue.of("acme").newest(None, 9)[0]] == [job.id]
    queue.move(job.id, "queued", "checked", before=("validating_files",))
    claimed = queue.claim()
    assert claimed is not None
    assert claimed.tenant == "acme"


@pytest.fixture
def order(files: TrainingFiles, tmp_path: Path) -> Order:
    return order_of(keep(files, tmp_path))


def holders(catalog: Catalog, *tenants: str) -> None:
    for tenant in tenants:
        Keys(catalog).create("a key", tenant, ["train"])


def fill(queue: Queue, order: Order, most: int, places: int) -> None:
    """Take so many places of `most`, which are all that this tenant gets."""
    for _ in range(places):
        queue.add(order, most_jobs=most)
    with pytest.raises(QuotaExceeded, match=rf"{most} may \(max_jobs\)"):
        queue.add(order, most_jobs=most)


def test_one_tenant_leaves_room_for_others(catalog: Catalog, queue: Queue, order: Order) -> None:
    holders(catalog, "acme", "zeta")
    acme, zeta = queue.of("acme"), queue.of("zeta")
    fill(acme, order, 8, 4)
    fill(zeta, order, 8, 2)
    with pytest.raises(QuotaExceeded, match="6 jobs have not ended, 4 of them yours"):
        acme.check_line(8)
    queue.of("beta").check_line(8)
    with pytest.raises(Overloaded, match="6 jobs have not ended, 6 may"):
        queue.of("beta").check_line(6)


@pytest.mark.parametrize("tenants", [(), ("acme",)])
def test_who_is_alone_has_the_whole_line(
    catalog: Catalog, queue: Queue, order: Order, tenants: tuple[str, ...]
) -> None:
    holders(catalog, *tenants)
    mine = queue.of(tenants[0]) if tenants else queue
    for _ in range(3):
        mine.add(order, most_jobs=3)
    with pytest.raises(Overloaded):
        mine.add(order, most_jobs=3)


def test_no_job_comes_back_into_a_line_that_is_full(
    catalog: Catalog, queue: Queue, order: Order
) -> None:
    """A paused one is still in it; a failed one has left its place to others."""
    holders(catalog, "acme", "zeta")
    acme = queue.of("acme")
    failed, paused = acme.add(order), acme.add(order)
    for job in (failed, paused):
        queue.set(job.id, checked=Checked({"optim": {}}, 1, 1).to_json())
    queue.fail(failed.id, Fault("x", "why"), before=("validating_files",))
    acme.pause(paused.id)
    fill(acme, order, 4, 1)
    with pytest.raises(QuotaExceeded, match="2 of them yours"):
        acme.resume(failed.id, most_jobs=4)
    assert acme.get(failed.id).status == "failed"
    assert acme.resume(paused.id, most_jobs=4).status == "queued"


@pytest.mark.parametrize("status", ["validating_files", "queued"])
def test_tenants_take_turns(queue: Queue, order: Order, status: Status) -> None:
    """Whoever came with many jobs first does not make another wait for all of them."""
    owners = ("acme", "acme", "acme", "zeta", "zeta")
    ids = [queue.of(owner).add(order).id for owner in owners]
    turns = []
    for job_id in ids:
        queue.move(job_id, status, "checked", before=("validating_files",))
    for _ in ids:
        job = queue.next_in(status)
        assert job is not None
        turns.append(ids.index(job.id))
        queue.move(job.id, "succeeded", "done", before=(status,))
    assert turns == [0, 3, 1, 4, 2]
    assert queue.next_in(status) is None


def test_who_has_a_job_running_comes_after_who_has_none(queue: Queue, order: Order) -> None:
    ids = [queue.of(owner).add(order).id for owner in ("acme", "zeta", "acme", "zeta")]
    for job_id in ids:
        queue.move(job_id, "queued", "checked", before=("validating_files",))
    claimed = [queue.claim() for _ in range(2)]
    assert [job and job.id for job in claimed] == ids[:2]
    queue.move(ids[1], "succeeded", "done", before=("running",))
    later = queue.claim()
    assert later is not None
    assert later.id == ids[3], "acme's long one still runs"
