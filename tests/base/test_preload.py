from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from base.deferred import TESTED

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


def test_the_torch_whose_modules_are_deferred_is_the_one_that_is_pinned() -> None:
    """Whoever pins another one runs tests/base/test_deferred.py on it, slow ones too."""
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"torch=={TESTED}" in [line.split()[0] for line in pinned if line.startswith("torch==")]
