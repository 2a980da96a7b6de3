"""Compile csrc/ into one shared library beside it. By hand: `python -m base.kernels.build`.

Installing the package does this; a machine without a C compiler gets no library, a reason, and the
torch path. Nothing here imports torch: the installer runs it in an environment of its own.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "_native.so"
REASON = "_native.txt"  # why there is no library: read by `native_status`

# -ffp-contract=off: the sources say where a multiply-add is fused, so that every unrolled copy of
# a loop rounds alike. That is what keeps the bits independent of the batch.
_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off"]
_FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
_VNNI = [*_AVX512, "-mavx512vnni"]


class BuildFailed(Exception):
    """No compiler, or it refused."""


def build(out_dir: Path | None = None) -> Path | None:
    """Compile the library into `out_dir` (default: this package) and return its path.

    None where that is impossible: the reason is then in `_native.txt` beside it.
    CC names the compiler; NIBBLE_CFLAGS adds flags (sanitizers).
    """
    target = (out_dir or Path(__file__).parent) / LIBRARY
    reason = target.with_name(REASON)
    try:
        _compile(target)
    except (BuildFailed, OSError) as error:
        target.unlink(missing_ok=True)
        reason.write_text(f"{error}\n")
        return None
    reason.unlink(missing_ok=True)
    return target


def _compile(target: Path) -> None:
    compiler = _compiler()
    flags = [*_FLAGS, *shlex.split(os.environ.get("NIBBLE_CFLAGS", ""))]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for name, extra in _units().items():
            objects.append(f"{folder}/{name}.o")
            source = str(SOURCES / f"{name}.c")
            _run([*compiler, *flags, *extra, "-c", source, "-o", objects[-1]])
        # Link aside and rename: a running server keeps the file it has mapped.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
            _run([*compiler, "-shared", *sanitizers, *objects, "-o", str(fresh), "-lm", "-pthread"])
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)


def _units() -> dict[str, list[str]]:
    """Source files by name, each with the instruction sets it may use."""
    names = ("portable", "fast_portable", "dispatch", "decoder", "pool")
    units: dict[str, list[str]] = {name: [] for name in names}
    if platform.machine().lower() in ("x86_64", "amd64"):
        units |= {"avx2": _AVX2, "avx512": _AVX512, "fast_avx2": _AVX2, "fast_vnni": _VNNI}
    elif platform.machine().lower() in ("aarch64", "arm64"):
        units |= {"fast_neon": ["-march=armv8.2-a+dotprod"]}
    return units


def _compiler() -> list[str]:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    raise BuildFailed("no C compiler: none of $CC, cc, gcc, clang is on the PATH")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        errors = [line for line in lines if "error" in line]
        raise BuildFailed(f"{command[0]} failed: {(errors or lines)[0]}")


if __name__ == "__main__":
    built = build()
    if built is None:
        sys.exit((Path(__file__).parent / REASON).read_text().strip())
    print(built)
