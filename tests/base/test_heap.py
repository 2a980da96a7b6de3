"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: what other tests left in the heap would take some of the holes.
HOLES = """
import psutil, torch
from base import heap

torch.empty(4 << 20).fill_(1)  # 16 MiB come and go: from now on such sizes stay in the heap
tensors = [torch.empty(2 << 20).fill_(1) for _ in range(33)]
del tensors[1:-1:2]  # 16 holes of 8 MiB, a live tensor on either side
before = psutil.Process().memory_info().rss
heap.trim()
print(before - psutil.Process().memory_info().rss >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_what_is_free_between_live_tensors_is_given_back() -> None:
    """Holes of a size that the heap keeps, with live tensors between them."""
    ran = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 64, f"{ran.stdout} MiB of 128 were given back"
