from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, threading
from base.preload import preload_torch
preload_torch()
for thread in threading.enumerate():
    if thread.name == "nibble-preload":
        thread.join()
assert "torch" not in sys.modules
print("libtorch_cpu.so" in open("/proc/self/maps").read())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells its maps")
def test_the_library_is_in_memory_before_torch_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True"
