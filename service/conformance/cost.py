"""What an adapter costs for each token: the registry's expressions, filled in for one adapter."""

from __future__ import annotations

from collections.abc import Iterator

from adapters.manifest import AdapterManifest
from adapters.methods import METHODS, Method
from base.spec import BaseSpec


def method_of(kind: str, peft_type: str = "") -> Method:
    """The registry's row of a kind."""
    return METHODS[(peft_type or kind).upper()]


def flops_of_base(spec: BaseSpec) -> int:
    """Of one token through every linear layer, the output head among them."""
    return sum(2 * shape.out_features * shape.in_features for shape in spec.linears.values())


def flops_of(manifest: AdapterManifest, method: Method, spec: BaseSpec) -> int:
    """What the adapter adds for one token: the registry's expression over all its targets.

    Private weights stand in the place of the base's: only what they need beyond counts.
    """
    total = 0
    for m, n in _targets(manifest, method, spec):
        # The expressions are constants of adapters/methods.py, never a user's.
        rank = manifest.rank
        numbers = {"r": rank, **manifest.config, "rank": rank, "m": m, "n": n}
        known = {"__builtins__": {}, "len": len, "int": int}
        flops = int(eval(method.flops, known, numbers))
        total += flops - (2 * m * n if method.form == "private weights" else 0)
    return total


def _targets(
    manifest: AdapterManifest, method: Method, spec: BaseSpec
) -> Iterator[tuple[int, int]]:
    """m and n, as the row means them."""
    if method.form == "prefix KV":
        for _ in range(spec.num_layers):
            yield spec.num_kv_heads * spec.head_dim, spec.num_heads * spec.head_dim
        return
    for path in manifest.targets:
        if path in spec.linears:
            yield spec.linears[path].out_features, spec.linears[path].in_features
        elif path in spec.embeddings:
            yield spec.embeddings[path].rows, spec.embeddings[path].width
        else:
            yield spec.norms[path], spec.norms[path]
