"""The tests of the C library under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_access_outside_and_nothing_undefined() -> None:
    compiler = os.environ.get("CC", "cc")
    if sys.platform != "linux" or not shutil.which(compiler):
        pytest.skip("needs a C compiler on Linux")
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip(f"{compiler} has no libasan")
    script = Path(__file__).with_name("sanitize.sh")
    done = subprocess.run(
        ["sh", str(script)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
