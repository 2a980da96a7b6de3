import json
from dataclasses import fields

import pytest

from adapters.manifest import AdapterManifest, adapter_digest, canonical_json

MANIFEST = AdapterManifest(
    digest="d" * 64,
    name="support",
    version=3,
    kind="dora",
    rank=8,
    targets=("lm_head", "model.layers.0.mlp.up_proj"),
    base_fingerprint="b" * 64,
    config={"r": 8, "rank_pattern": {"lm_head": 4}, "modules_to_save": None},
    weights_sha256="a" * 64,
    weights_bytes=100,
    memory_bytes=400,
    placement="merged",
    merged_dtype="nf4",
    template="{{ messages }} 한글",
    created="2026-01-01T00:00:00+00:00",
    provenance={"run": 7},
    vocabulary=640,
    tokenizer_sha256="c" * 64,
    tokenizer_bytes=7,
)


def test_json_keeps_every_field() -> None:
    assert all(getattr(MANIFEST, field.name) for field in fields(MANIFEST))
    assert AdapterManifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": [2, None]}) == canonical_json({"a": [2, None], "b": 1})
    assert json.loads(canonical_json({"a": "한"})) == {"a": "한"}
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_the_digest_depends_on_weights_config_base_and_tokenizer() -> None:
    config = {"r": 8, "alpha": 16.0}
    digest = adapter_digest("a" * 64, config, "b" * 64)
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")
    assert digest == adapter_digest("a" * 64, dict(reversed(config.items())), "b" * 64)
    others = {
        adapter_digest("c" * 64, config, "b" * 64),
        adapter_digest("a" * 64, config | {"alpha": 17.0}, "b" * 64),
        adapter_digest("a" * 64, config, "c" * 64),
        adapter_digest("b" * 64, config, "a" * 64),
        adapter_digest("a" * 64, config, "b" * 64, "d" * 64),
    }
    assert len(others | {digest}) == 6
