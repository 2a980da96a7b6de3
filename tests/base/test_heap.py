"""Freed memory goes back to the system."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from base import heap


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_what_is_free_between_live_tensors_is_given_back() -> None:
    """Holes of a size that the heap keeps, with live tensors between them."""
    torch.empty(4 << 20).fill_(1)  # 16 MiB come and go: from now on such sizes stay in the heap
    tensors = [torch.empty(2 << 20).fill_(1) for _ in range(33)]
    del tensors[1:-1:2]  # 16 holes of 8 MiB, a live tensor on either side
    before = psutil.Process().memory_info().rss
    heap.trim()
    freed = before - psutil.Process().memory_info().rss
    assert freed > 64 << 20, f"{freed >> 20} MiB of 128 were given back"
