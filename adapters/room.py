"""Whether a tenant may keep more: counted in the transaction that adds, so no two pass at once. And
whether there are others, for whom it leaves room where many wait.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from adapters.errors import QuotaReached
from adapters.manifest import AdapterManifest
from adapters.tables import (
    adapters,
    collections,
    manifest_json,
    prompt_templates,
    tenants,
    training_files,
)
from adapters.tables import training_jobs as jobs

MAX_ALIASES = 256  # of one name: whoever asks for it is told all of them


def check_room(
    connection: sa.Connection, tenant: str, *, nbytes: int = 0, draft: AdapterManifest | None = None
) -> None:
    """Raise QuotaReached where `draft`, or `nbytes` of anything else, is more than `tenant` may
    keep."""
    quotas = _quotas(connection, tenant)
    most, room = quotas.get("adapters"), quotas.get("bytes")
    if most is None and room is None:
        return
    versions, blobs = _kept(connection, tenant)
    if draft is not None and most is not None and versions >= most:
        raise QuotaReached(
            f"tenant {tenant!r} may keep {most} versions of adapters and has {versions}: delete "
            "one first"
        )
    if room is None:
        return
    if draft is not None:
        new = {draft.weights_sha256: draft.weights_bytes}
        if draft.tokenizer_sha256 is not None:
            new[draft.tokenizer_sha256] = draft.tokenizer_bytes
        nbytes = sum(size for address, size in new.items() if address not in blobs)  # kept once
    if not nbytes:
        return
    used = sum(blobs.values())
    for table in (training_files, collections):
        total = sa.select(sa.func.coalesce(sa.func.sum(table.c.nbytes), 0))
        used += int(connection.execute(total.where(table.c.tenant == tenant)).scalar_one())
    used += _held_by_jobs(connection, tenant)
    if used + nbytes > room:
        raise QuotaReached(
            f"tenant {tenant!r} may keep {room} bytes of adapters, training files and collections "
            f"and has {used}: {nbytes} more are too many; delete something first"
        )


def check_templates(connection: sa.Connection, tenant: str) -> None:
    """Raise QuotaReached where one version of a prompt template more is more than `tenant` may
    keep."""
    most = _quotas(connection, tenant).get("templates")
    if most is None:
        return
    living = (prompt_templates.c.tenant == tenant, prompt_templates.c.deleted.is_(None))
    count = sa.select(sa.func.count()).select_from(prompt_templates).where(*living)
    kept = connection.execute(count).scalar_one()
    if kept >= most:
        raise QuotaReached(
            f"tenant {tenant!r} may keep {most} versions of templates and has {kept}: delete one "
            "first"
        )


def check_aliases(
    connection: sa.Connection, table: sa.Table, tenant: str, name: str, alias: str
) -> None:
    """Raise QuotaReached where one more alias of a name is more than any name has."""
    mine = (table.c.tenant == tenant, table.c.name == name, table.c.alias != alias)
    others = sa.select(sa.func.count(sa.distinct(table.c.alias))).where(*mine)
    if (count := connection.execute(others).scalar_one()) >= MAX_ALIASES:
        raise QuotaReached(f"{name} has {count} aliases, and may have no more: drop one first")


def several(connection: sa.Connection) -> bool:
    """Whether more than one tenant has had a key."""
    query = sa.select(tenants.c.name).limit(2)
    return len(connection.execute(query).all()) > 1


def _quotas(connection: sa.Connection, tenant: str) -> dict[str, Any]:
    query = sa.select(tenants.c.quotas).where(tenants.c.name == tenant)
    found: dict[str, Any] = json.loads(connection.execute(query.with_for_update()).scalar() or "{}")
    return found


def _held_by_jobs(connection: sa.Connection, tenant: str) -> int:
    """Bytes of files that were deleted while jobs still need them, which have links of their own.
    (As `service.jobs.job.Job.over` has it, those that ended need them no more.)"""
    over = sa.or_(
        jobs.c.status.in_(("succeeded", "cancelled")),
        sa.and_(jobs.c.status == "failed", jobs.c.checked.is_(None)),
    )
    query = sa.select(jobs.c.ordered).where(jobs.c.tenant == tenant, sa.not_(over))
    orders = [json.loads(text) for text in connection.execute(query).scalars()]
    files = [order[name] for order in orders for name in ("training", "validation") if order[name]]
    sizes = {one["id"]: int(one["nbytes"]) for one in files}
    kept = sa.select(training_files.c.id).where(training_files.c.tenant == tenant)
    for known in connection.execute(kept).scalars():
        sizes.pop(known, None)
    return sum(sizes.values())


def _kept(connection: sa.Connection, tenant: str) -> tuple[int, dict[str, int]]:
    """How many versions live, and the bytes of their blobs by address. The database reads the
    manifests: all who write wait for this."""
    manifest = manifest_json(connection.dialect.name)
    sizes = (manifest[size].as_string() for size in ("weights_bytes", "tokenizer_bytes"))
    query = sa.select(adapters.c.weights_sha256, adapters.c.tokenizer_sha256, *sizes)
    rows = connection.execute(
        query.where(adapters.c.tenant == tenant, adapters.c.deleted.is_(None))
    ).all()
    weights = {row[0]: int(row[2]) for row in rows}
    tokenizers = {row[1]: int(row[3] or 0) for row in rows if row[1] is not None}
    return len(rows), {**weights, **tokenizers}
