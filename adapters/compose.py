"""A sum of adapters, named in one request: "a:0.7,b:0.3". No torch here.

    y  =  W x + b  +  Σ_i w_i ( Δ_i x + δ_i )

where Δ_i is a sum of low-rank terms and δ_i an offset of the bias. It is exact at any ranks: the
ranks of the parts are laid side by side. What is no such sum is refused here, before it costs
anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import InvalidAdapter
from adapters.manifest import AdapterManifest, canonical_json
from adapters.methods import METHODS

MAX_PARTS = 16
MAX_WEIGHT = 100.0
FIELD = "parameters.adapter_id"
SUMMED_FORMS = ("low-rank", "bias")

_INSTEAD = {
    "scales": "it multiplies what the layer gives, and a product is no part of a sum",
    "norm": "it replaces norms, and two replacements of one norm have no sum",
    "prefix KV": "its virtual tokens stand before the prompt, and have no weight there",
    "embedding rows": "it replaces rows of a table, and two replacements have no sum",
    "operator": "it computes more than a sum of low-rank terms",
    "private weights": "it has matrices of its own in place of the base's",
}


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter as a client wrote it, with its weight."""

    reference: str  # name, name@version, name@alias or sha256:<digest>
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """One version, pinned, with its weight in the sum."""

    manifest: AdapterManifest
    weight: float


def parse_terms(text: str) -> tuple[Term, ...]:
    """The terms of "a:0.7,b@prod:0.3"; a part without a weight has 1. Raises InvalidAdapter."""
    return tuple(_term(piece.strip()) for piece in text.split(","))


def _term(text: str) -> Term:
    scheme = "sha256:" if text.startswith("sha256:") else ""
    name, colon, number = text.removeprefix(scheme).partition(":")
    if not name:
        raise InvalidAdapter(
            f"{text[:80]!r} names no adapter: write name:weight, parts divided by commas", FIELD
        )
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        raise InvalidAdapter(
            f"the weight of {name[:80]} is {number[:80]!r}, expected a number such as 0.7", FIELD
        ) from None
    return Term(scheme + name, weight)


def check_terms(terms: Sequence[Term]) -> None:
    """Raise InvalidAdapter for too many parts, or a weight that means nothing."""
    if len(terms) > MAX_PARTS:
        raise InvalidAdapter(f"{len(terms)} parts, limit {MAX_PARTS}", FIELD)
    for term in terms:
        if not (math.isfinite(term.weight) and 0 < abs(term.weight) <= MAX_WEIGHT):
            raise InvalidAdapter(
                f"the weight of {term.reference} is {term.weight:g}; expected a number of at most "
                f"{MAX_WEIGHT:g} that is not 0 (leave the part out)",
                FIELD,
            )


def sum_of(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same sum in its one canonical order; a digest that is there twice has both weights."""
    found: dict[str, Part] = {}
    for part in parts:
        digest = part.manifest.digest
        known = found.get(digest)
        found[digest] = Part(part.manifest, part.weight + (known.weight if known else 0.0))
    return tuple(found[digest] for digest in sorted(found) if found[digest].weight != 0)


def composed_digest(parts: Sequence[Part]) -> str:
    """sha-256 over the digests and weights: the identity of the sum, whatever its order."""
    pairs = sorted((part.manifest.digest, float(part.weight)) for part in parts)
    return hashlib.sha256(canonical_json({"sum": [list(p) for p in pairs]}).encode()).hexdigest()


def check_sum(parts: Sequence[Part], max_rank: int, max_bytes: int) -> None:
    """Raise InvalidAdapter for a part that is no sum of low-rank terms, or a sum that is too large.

    max_rank   of the ranks together; max_bytes of all factors in float32
    """
    for part in parts:
        reason = why_not(part.manifest)
        if reason:
            what = f"{part.manifest.name}@{part.manifest.version}"
            raise InvalidAdapter(f"{what} cannot be part of a sum: {reason}", FIELD)
    ranks = [part.manifest.rank for part in parts]
    if sum(ranks) > max_rank:
        shown = " + ".join(map(str, ranks))
        raise InvalidAdapter(
            f"the ranks are {shown} = {sum(ranks)} together, limit {max_rank}: take fewer parts, "
            'or store one of a lower rank: POST /adapters/{name}/compose with "method": "svd"',
            FIELD,
        )
    sizes = [part.manifest.memory_bytes for part in parts]
    if sum(sizes) > max_bytes:
        shown = " + ".join(map(str, sizes))
        raise InvalidAdapter(
            f"the parts take {shown} = {sum(sizes)} bytes together, limit {max_bytes} (slot_bytes)",
            FIELD,
        )


def why_not(manifest: AdapterManifest) -> str:
    """Why a version cannot be part of a sum, and what to do instead; empty when it can."""
    config = manifest.config
    if manifest.placement == "merged":
        return (
            "it is served merged, as matrices of its own; upload it with placement=unmerged, "
            "or name it alone"
        )
    if manifest.vocabulary or manifest.tokenizer_sha256:
        return (
            "it has a vocabulary of its own, and a token that one part knows and another does not "
            "has no sum; name it alone"
        )
    if manifest.invocation:
        return "it is activated by tokens of the prompt, and a sum holds everywhere; name it alone"
    if config.get("use_dora"):
        return (
            "DoRA scales the rows of W + BA to a norm of its own, so a sum of two is not what "
            "either was trained for; name it alone, or train with use_dora=false"
        )
    if config.get("modules_to_save"):
        saved = ", ".join(config["modules_to_save"])
        return (
            f"modules_to_save replaces {saved[:200]} whole, and two replacements have no sum; name "
            "it alone, or train without modules_to_save"
        )
    form = METHODS[config["peft_type"]].form if config.get("peft_type") in METHODS else None
    if form in SUMMED_FORMS:
        return ""
    why = _INSTEAD.get(str(form), "it is no sum of low-rank terms")
    return f"{manifest.kind}: {why}; name it alone"
