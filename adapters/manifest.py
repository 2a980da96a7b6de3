"""AdapterManifest: who an adapter is. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Placement = Literal["unmerged", "merged"]
MergedDtype = Literal["bfloat16", "float32", "nf4"]
DEFAULT_TENANT = "default"  # whose everything is where there are no keys


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """One immutable adapter version.

    `digest` is sha-256 (64 hex digits) over the weights, the canonical config and the base
    fingerprint: the adapter's identity. A name is only an alias to a digest.
    """

    digest: str
    name: str
    version: int
    kind: str  # "lora" | "rslora" | "dora" | ...
    rank: int  # the largest rank of any target
    targets: tuple[str, ...]  # module paths, sorted
    base_fingerprint: str
    config: Mapping[str, Any]  # the canonical adapter_config
    weights_sha256: str  # address of the weights blob
    weights_bytes: int  # size of the weights blob
    memory_bytes: int  # what a slot will need, in fp32
    placement: Placement = "unmerged"
    merged_dtype: MergedDtype = "bfloat16"
    template: str | None = None
    vocabulary: int = 0  # rows of its tables; 0: as many as the base's
    tokenizer_sha256: str | None = None  # address of its own tokenizer.json, where it has one
    tokenizer_bytes: int = 0  # size of that blob
    created: str = ""  # ISO 8601, UTC
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that stand before every prompt and take room in the context."""
        return int(self.config.get("num_virtual_tokens") or 0)

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens that activate it; none: it holds from the first token on."""
        return tuple(self.config.get("alora_invocation_tokens") or ())

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AdapterManifest:
        """The manifest that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "targets": tuple(fields["targets"])})


def canonical_json(value: Mapping[str, Any]) -> str:
    """One text for one value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def adapter_digest(
    weights_sha256: str,
    config: Mapping[str, Any],
    base_fingerprint: str,
    tokenizer_sha256: str | None = None,
) -> str:
    """sha-256 over what decides the adapter's output: weights, canonical config, base, and its own
    tokenizer where it has one."""
    parts = {"base": base_fingerprint, "config": config, "weights": weights_sha256}
    if tokenizer_sha256 is not None:
        parts["tokenizer"] = tokenizer_sha256
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()
