"""What a request's names come to, for the tenant who asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.compose import Term
from adapters.errors import AdapterNotFound
from adapters.sharing import Share, Shares
from adapters.store import AdapterStore
from service.selection import select
from tests.adapters.test_manifest import MANIFEST


def test_an_adapter_is_called_by_its_tenant_too(tmp_path: Path) -> None:
    """In metrics and logs, where the names of all tenants meet."""
    store = AdapterStore(str(tmp_path / "blobs"), str(tmp_path / "catalog.db"))
    for tenant in ("default", "acme"):
        for name, digest in (("support", "a"), ("other", "b")):
            draft = replace(
                MANIFEST,
                name=name,
                version=0,
                digest=digest * 64,
                kind="lora",
                config={"peft_type": "LORA", "r": 4},
                placement="unmerged",
                vocabulary=0,
                tokenizer_sha256=None,
            )
            store.of(tenant).catalog.add(draft)

    def called(tenant: str, *names: str) -> str:
        terms = [Term(name) for name in names]
        found = select(terms, store.of(tenant), client=None, max_rank=64, max_bytes=1 << 40)
        return found.ref.name

    assert called("default", "support") == "support"
    assert called("acme", "support") == "acme/support"
    assert called("acme", "support", "other") == "acme/support+other"
    with pytest.raises(AdapterNotFound):
        called("zeta", "support")
    Shares(store.catalog).set(Share("adapter", "acme", "support", ("zeta",)))
    assert called("zeta", "support") == "zeta/support"  # by who asks, not by who owns
    store.close()
