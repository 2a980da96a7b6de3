"""Memory that is not needed goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from base.heap import _unchanged

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


LIBRARIES = """
import psutil, torch
from base import heap

rows = torch.randn(64, 64)
wanted = torch.linalg.inv(rows)
before = psutil.Process().memory_info().rss
heap.drop_library_pages()
print(before - psutil.Process().memory_info().rss >> 20)
assert torch.equal(torch.linalg.inv(rows), wanted)
import torch.utils.benchmark, sqlite3, numpy.linalg
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells its maps")
def test_libraries_work_without_the_pages_that_their_start_read() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) > 20, f"{ran.stdout} MiB of torch's files were unmapped"


def test_only_what_nobody_wrote_is_dropped() -> None:
    def mapping(start: str, access: str, file: str, anonymous: int) -> str:
        return (
            f"{start}000-{start}fff {access} 00000000 fe:00 12 {file}\nRss: 8 kB\n"
            f"Anonymous: {anonymous} kB\nVmFlags: rd mr mw me\n"
        )

    smaps = (
        mapping("1", "r-xp", "/lib/libtorch_cpu.so", 0)
        + mapping("2", "r--p", "/lib/libtorch_cpu.so", 4)  # relocated: its pages are our own
        + mapping("3", "rw-p", "/lib/libtorch_cpu.so", 0)  # somebody may be writing
        + mapping("4", "r--s", "/lib/libtorch_cpu.so", 0)
        + mapping("5", "r--p", "/lib/libc.so.6", 0)
        + mapping("6", "r--p", "/srv/bases/kept.safetensors", 0)
        + "7000-7fff r--p 00000000 00:00 0\nRss: 8 kB\nAnonymous: 0 kB\n"
    )
    assert list(_unchanged(smaps)) == [(0x1000, 0x1FFF), (0x5000, 0x5FFF)]


HEAPS = """
import ctypes, os, sys, threading
from base.heap import few_heaps

if sys.argv[1] == "few":
    few_heaps()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
number = 2 * max(2, os.cpu_count()) + 8  # more than there may be heaps
all_there = threading.Barrier(number)

def allocate() -> None:
    all_there.wait()  # all live at once, so that none has the heap of one that ended
    libc.malloc(1000)
    all_there.wait()

threads = [threading.Thread(target=allocate) for _ in range(number)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, out)
libc.fclose(out)
"""


CORES = max(2, os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize(
    ("heaps", "by_user", "least", "most"),
    [
        ("few", {}, 2, 2 * CORES),
        ("many", {}, 2 * CORES + 1, 8 * CORES),
        ("few", {"MALLOC_ARENA_MAX": "3"}, 2, 3),
    ],
)
def test_threads_share_heaps(
    tmp_path: Path, heaps: str, by_user: dict[str, str], least: int, most: int
) -> None:
    made = tmp_path / "info.xml"
    own = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", HEAPS, heaps, str(made)]
    subprocess.run(command, check=True, env=own | by_user)
    assert least <= made.read_text().count("<heap ") <= most
