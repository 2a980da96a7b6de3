"""How the C library keeps memory that a step has given back."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of malloc.h
OWN_PAGES = 1 << 20  # bytes from which an allocation has pages of its own


def return_large_tensors() -> None:
    """Let large tensors go back to the system when they are freed.

    glibc would take them from its heap once it has seen them freed, and what lies between them
    keeps their pages: a step's peak was a quarter higher. Elsewhere nothing is changed.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, OWN_PAGES)
