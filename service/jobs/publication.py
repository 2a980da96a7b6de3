"""The trained adapter through the ordinary upload: the same checks, the same trial run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import AdapterNotFound
from adapters.limits import Limits
from adapters.prompts.shelf import PROVENANCE
from adapters.store import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    AdapterStore,
    Probe,
    read_small,
)
from base.spec import BaseSpec
from service.access.audit import AuditLog
from service.errors import NotTrained
from service.jobs.job import Job
from service.jobs.order import OUT, FileStamp, Order

JOB = "fine_tuning_job"  # of a version's provenance


@dataclass(frozen=True, slots=True)
class Publication:
    """Where trained adapters go."""

    store: AdapterStore
    spec: BaseSpec
    limits: Limits
    probe: Probe
    audit: AuditLog | None = None

    def publish(self, job: Job, directory: Path, done: Mapping[str, Any]) -> str:
        """`name@version`, which serves from now on; `done` is what the run said at its end.

        The same adapter again, as the newest version's, is that version. Raises AdapterError,
        NotTrained.
        """
        check_name(self.store.of(job.tenant), job.order)
        out = directory / OUT
        template = out / TEMPLATE_FILE
        found = self.store.of(job.tenant).add(
            job.order.name,
            read_small(out / CONFIG_FILE, self.limits.max_config_bytes, "config"),
            out / WEIGHTS_FILE,
            template.read_text(encoding="utf-8") if template.is_file() else None,
            self.spec,
            self.limits,
            provenance=provenance(job, done),
            probe=self.probe,
        )
        name = f"{found.name}@{found.version}"
        if self.audit is not None:
            said = {"of": {"job_id": job.id}, "tenant": job.tenant}
            self.audit.note("publish", adapter=name, digest=found.digest, **said)
        return name


def check_name(store: AdapterStore, order: Order) -> None:
    """Whoever may train need not be who may change what serves. So a job adds versions to a name
    that is new, or whose newest version a job has made; to one that was uploaded, or that another
    tenant shares, only with the scope for that. Raises NotTrained.
    """
    if order.replaces:
        return
    try:
        newest = store.resolve(order.name)
    except AdapterNotFound:
        return
    if JOB not in newest.provenance:
        raise NotTrained(order.name)


def provenance(job: Job, done: Mapping[str, Any]) -> dict[str, Any]:
    """How an adapter came about: its job, its config, the digest of its data."""
    order = job.order
    config = {} if job.checked is None else dict(job.checked.config)
    return {
        JOB: job.id,
        "training_file": _stamp(order.training),
        **({} if order.validation is None else {"validation_file": _stamp(order.validation)}),
        # The digest keeps the template from being deleted under the adapter.
        **({} if order.template is None else {PROVENANCE: order.template.digest}),
        # Of this machine: where the base lies. The manifest has the base's fingerprint.
        "config": {key: value for key, value in config.items() if key not in ("base", "out")},
        "run": {key: done[key] for key in ("steps", "tokens", "loss", "eval_loss") if key in done},
    }


def _stamp(file: FileStamp) -> dict[str, Any]:
    return {"id": file.id, "sha256": file.sha256, "bytes": file.nbytes}
