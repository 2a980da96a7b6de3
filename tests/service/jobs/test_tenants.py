"""Jobs and files of tenants: one line, where everybody sees their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import NotFound
from service.jobs.files import TrainingFiles
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
    assert queue.waiting() == zeta.waiting() == 2  # one line for all
    queue.move(job.id, "queued", "checked", before=("validating_files",))
    claimed = queue.claim()
    assert claimed is not None
    assert claimed.tenant == "acme"
