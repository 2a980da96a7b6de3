"""How an alias shares its traffic among versions, so that a client keeps the one it has. No torch.

Weighted rendezvous hashing: each arm draws u in (0, 1) from a hash of alias, client and arm, and
the largest w / -ln(u) wins. An arm's share is its weight's, and a change of weights moves only
clients to arms whose share grew. (Thaler and Ravishankar 1998; the weighted form is the logarithmic
method of Schindelhauer and Schomaker 2005, section 3.)
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.manifest import AdapterManifest

MAX_ARMS = 16


@dataclass(frozen=True, slots=True)
class Arm:
    """One version behind an alias, and its share of the traffic, beside those of the others."""

    manifest: AdapterManifest
    weight: float = 1.0


def choose(arms: Sequence[Arm], alias: str, client: str | None) -> Arm:
    """The arm of this client, always the same while the arms are; without a client, any by weight.

    alias   `name@alias`, so that a client's arm in one experiment says nothing of another
    """
    if len(arms) == 1:
        return arms[0]
    key = secrets.token_hex(16) if client is None else client
    return max(arms, key=lambda arm: _draw(arm, alias, key))


def _draw(arm: Arm, alias: str, client: str) -> float:
    version = arm.manifest.version
    text = "\0".join((alias, str(version), client)).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    u = (number + 0.5) / 2**64
    return arm.weight / -math.log(u) if arm.weight > 0 and u < 1 else 0.0
