"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim() -> None:
    """Return what is free inside the C heap; does nothing where the C library is not glibc.

    glibc keeps a large freed tensor once it has seen one of its size come and go, and small live
    ones between them hold the heap up: quantising 0.36 B weights left 1.6 GiB that nobody used.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
