"""The filter's C by itself, against clients that send anything in any pieces (fuzz_accept.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "service" / "net" / "csrc"
ASAN = "-fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.mark.parametrize(
    ("sanitizer", "library", "connections"),
    [
        ("", "", 2000),
        pytest.param(ASAN, "libasan.so", 400_000, marks=pytest.mark.slow),
        pytest.param("-fsanitize=thread", "libtsan.so", 150_000, marks=pytest.mark.slow),
    ],
)
def test_what_is_handed_over_is_what_was_sent(
    tmp_path: Path, sanitizer: str, library: str, connections: int
) -> None:
    compiler = os.environ.get("CC", "cc")
    if sys.platform != "linux" or not shutil.which(compiler):
        pytest.skip("needs a C compiler on Linux")
    if library and not Path(_run([compiler, f"-print-file-name={library}"]).strip()).is_absolute():
        pytest.skip(f"{compiler} has no {library}")
    made = str(tmp_path / "fuzz")
    flags = ["-g", "-O1", "-std=gnu11", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    sources = [str(Path(__file__).with_name("fuzz_accept.c")), *map(str, SOURCES.glob("*.c"))]
    _run([compiler, *flags, *sanitizer.split(), *sources, "-o", made])
    said = _run([made, "7", str(connections)])
    assert said.startswith(f"{connections} connections"), said


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
