"""Under which names a job's adapter may serve."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.catalog import Catalog
from adapters.sharing import Share, Shares
from service.errors import NotTrained
from service.jobs.order import FileStamp, Order
from service.jobs.publication import JOB, check_name
from tests.adapters.test_manifest import MANIFEST

ORDER = Order("mini", "support", FileStamp("file-1", "rows.jsonl", ".jsonl", 1, "0" * 64))


@pytest.fixture
def catalog(tmp_path: Path, empty_catalog: Path) -> Iterator[Catalog]:
    catalog = Catalog(str(shutil.copy(empty_catalog, tmp_path)))
    yield catalog
    catalog.close()


def add(catalog: Catalog, digest: str, **provenance: str) -> None:
    draft = replace(MANIFEST, name="support", version=0, digest=digest * 64, provenance=provenance)
    catalog.add(draft)


def check(catalog: Catalog, order: Order = ORDER) -> None:
    store: Any = SimpleNamespace(resolve=catalog.latest)
    check_name(store, order)


def test_a_new_name_and_what_jobs_have_made(catalog: Catalog) -> None:
    check(catalog)
    add(catalog, "a", **{JOB: "ftjob-1"})
    check(catalog)


def test_what_was_uploaded_stays_unless_the_key_may_write(catalog: Catalog) -> None:
    add(catalog, "a", **{JOB: "ftjob-1"})
    add(catalog, "b")
    with pytest.raises(NotTrained, match=r"not made by .* adapters:write") as refused:
        check(catalog)
    assert refused.value.wanted == ("adapters:write",)
    check(catalog, replace(ORDER, replaces=True))
    catalog.delete("support", 2, "now")
    check(catalog)


def test_what_another_tenant_shares_is_not_hidden_by_a_job(catalog: Catalog) -> None:
    add(catalog.of("acme"), "a")
    zeta = catalog.of("zeta")
    check(zeta)
    Shares(catalog).set(Share("adapter", "acme", "support", ("zeta",)))
    with pytest.raises(NotTrained):
        check(zeta)


def test_an_order_keeps_what_its_key_was_allowed() -> None:
    assert not Order.from_json(ORDER.to_json()).replaces
    assert Order.from_json(replace(ORDER, replaces=True).to_json()).replaces
