"""Triton's kernels in its interpreter: the tests marked `cuda`, in a process of their own.

The interpreter is chosen when `triton` is first imported, and other tests may have imported it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests run on the GPU themselves")
@pytest.mark.parametrize(
    "chosen", ["cuda and not slow", pytest.param("cuda and slow", marks=pytest.mark.slow)]
)
def test_the_kernels_in_the_interpreter(chosen: str) -> None:
    pytest.importorskip("triton")
    here = Path(__file__).parent
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", chosen, "-p", "no:cacheprovider"),
            *sorted(str(path) for path in here.glob("test_triton_*.py")),
        ],
        cwd=here.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout
    assert "skipped" not in run.stdout, run.stdout
