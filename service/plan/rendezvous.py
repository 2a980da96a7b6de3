"""Rendezvous hashing (Thaler and Ravishankar, 1998): an order of places for each key, without
anything that those who ask have to agree on. A place that comes or goes moves only its own share.

Ray's ingress routes by it (deploy/ray/router.py), and the simulation of a fleet does as it does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

Place = TypeVar("Place")


def rendezvous(
    key: object, places: Iterable[Place], name_of: Callable[[Place], object] = str
) -> list[Place]:
    """All places, in the order of this key; the first is its home. Names tell places apart."""

    def weight(place: Place) -> bytes:
        return hashlib.blake2b(f"{key}\0{name_of(place)}".encode(), digest_size=8).digest()

    return sorted(places, key=weight, reverse=True)
