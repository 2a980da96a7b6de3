"""Whether a tenant may keep more: counted in the transaction that adds, so no two pass at once."""

from __future__ import annotations

import json

import sqlalchemy as sa

from adapters.errors import QuotaReached
from adapters.manifest import AdapterManifest
from adapters.tables import adapters, collections, tenants, training_files


def check_room(
    connection: sa.Connection, tenant: str, *, nbytes: int, draft: AdapterManifest | None = None
) -> None:
    """Raise QuotaReached where `draft`, or `nbytes` of anything else, is more than `tenant` may
    keep."""
    query = sa.select(tenants.c.quotas).where(tenants.c.name == tenant)
    quotas = json.loads(connection.execute(query.with_for_update()).scalar() or "{}")
    most, room = quotas.get("adapters"), quotas.get("bytes")
    if most is None and room is None:
        return
    living = sa.select(adapters.c.manifest).where(
        adapters.c.tenant == tenant, adapters.c.deleted.is_(None)
    )
    kept = [AdapterManifest.from_json(text) for text in connection.execute(living).scalars()]
    if draft is not None and most is not None and len(kept) >= most:
        raise QuotaReached(
            f"tenant {tenant!r} may keep {most} versions of adapters and has {len(kept)}: delete "
            "one first"
        )
    if room is None:
        return
    blobs = {one.weights_sha256: one.weights_bytes for one in kept}
    if draft is not None and draft.weights_sha256 in blobs:
        return  # they are kept once
    used = sum(blobs.values())
    for table in (training_files, collections):
        total = sa.select(sa.func.coalesce(sa.func.sum(table.c.nbytes), 0))
        used += int(connection.execute(total.where(table.c.tenant == tenant)).scalar_one())
    if used + nbytes > room:
        raise QuotaReached(
            f"tenant {tenant!r} may keep {room} bytes of adapters, training files and collections "
            f"and has {used}: {nbytes} more are too many; delete something first"
        )
