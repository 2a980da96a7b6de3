"""A server's jobs, from its settings: where they lie, and which of the catalog's are its own."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from adapters.blobs import disk_errors
from base.hub import locate
from base.machine import inspect
from service.config import Settings
from service.jobs.files import TrainingFiles
from service.jobs.office import Office
from service.jobs.process import Confinement
from service.jobs.publication import Publication
from service.jobs.queue import Queue
from service.jobs.runner import Workshop

_HOME_ID = re.compile(r"[0-9a-f]{32}")


def open_office(settings: Settings, publication: Publication) -> Office:
    """Files and queue, swept of what a crash left; nothing runs before `start`."""
    catalog = publication.store.catalog
    home = own_id(settings.home)
    files = TrainingFiles(catalog, settings.home / "files", home)
    files.sweep()
    machine = inspect()
    workshop = Workshop(
        home=settings.home / "jobs",
        base=str(locate(settings.base_source, settings.revision).directory),
        double_quant=settings.double_quant,
        confinement=Confinement(
            nice=settings.job_nice,
            threads=settings.job_threads or max(1, machine.cores // 2),
            memory_bytes=settings.job_memory_bytes or machine.memory_total // 2,
        ),
        at_once=settings.jobs_at_once,
        max_minutes=settings.max_job_minutes,
    )
    return Office(Queue(catalog, home), files, workshop, publication, settings.max_jobs)


def own_id(home: Path) -> str:
    """Names this home in a catalog that several servers may share: made once, kept there.

    Raises StoreFull, StoreUnavailable.
    """
    path = home / "id"
    with disk_errors("cannot read the id of this home"):
        if path.is_file() and _HOME_ID.fullmatch(found := path.read_text("ascii").strip()):
            return found
    made = secrets.token_hex(16)
    with disk_errors("cannot keep the id of this home"):
        home.mkdir(parents=True, exist_ok=True)
        path.write_text(made + "\n", encoding="ascii")
    return made
