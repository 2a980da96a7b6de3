"""Compile csrc/ into one shared library beside it. By hand: `python -m base.kernels.build`.

Installing the package does this; a machine without a C compiler gets no library, a reason, and the
torch path. Nothing here imports torch: the installer runs it in an environment of its own. The
library holds what it was made from, so that installing again, for an extra say, compiles nothing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
_AT_ONCE = 4  # compilers, of up to half a GB each
_MARK = b"nibble's kernels, made from "

Units = dict[str, list[str]]  # source files by name, each with the instruction sets it may use


class BuildFailed(Exception):
    """No compiler, or it refused."""


def build(out_dir: Path | None = None) -> Path | None:
    """Compile the kernels into `out_dir` (default: this package), as `build_library` says."""
    return build_library((out_dir or Path(__file__).parent) / LIBRARY, SOURCES, _units())


def build_library(target: Path, sources: Path, units: Units | None = None) -> Path | None:
    """Compile units of `sources` (default: all) into the library `target`, and return its path.

    None where that is impossible: the reason is then beside it, in a file of its name with `.txt`.
    CC names the compiler; NIBBLE_CFLAGS adds flags (sanitizers). One that is there already and was
    made from the same sources, by the same compiler with the same flags, stays as it is.
    """
    reason = target.with_suffix(".txt")
    units = units or {source.stem: [] for source in sorted(sources.glob("*.c"))}
    try:
        compiler, flags = _compiler(), _flags()
        if not _says(target, mark := _mark(compiler, flags, sources, units)):
            _compile(target, compiler, flags, mark, sources, units)
    except (BuildFailed, OSError) as error:
        target.unlink(missing_ok=True)
        reason.write_text(f"{error}\n")
        return None
    reason.unlink(missing_ok=True)
    return target


def is_current(library: Path) -> bool:
    """Was it made from these sources, as `build` would make it now? False without a compiler."""
    try:
        return _says(library, _mark(_compiler(), _flags(), SOURCES, _units()))
    except (BuildFailed, OSError):
        return False


def _says(library: Path, mark: bytes) -> bool:
    return library.exists() and mark in library.read_bytes()


def _flags() -> list[str]:
    return [*_FLAGS, *shlex.split(os.environ.get("NIBBLE_CFLAGS", ""))]


def _mark(compiler: list[str], flags: list[str], sources: Path, units: Units) -> bytes:
    """What a library holds that was made from these sources by this compiler."""
    made = hashlib.sha256(_run([*compiler, "--version"]).encode())
    made.update(repr((compiler, flags, units)).encode())
    for source in sorted(sources.iterdir()):
        made.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return _MARK + made.hexdigest().encode()


def _compile(
    target: Path, compiler: list[str], flags: list[str], mark: bytes, sources: Path, units: Units
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        marked = Path(folder) / "made_from.c"
        marked.write_text(
            f'__attribute__((used)) const char nibble_made_from[] = "{mark.decode()}";\n'
        )
        files = {marked: list[str](), **{sources / f"{n}.c": more for n, more in units.items()}}
        objects = [f"{folder}/{source.stem}.o" for source in files]
        commands = [
            [*compiler, *flags, *more, "-c", str(source), "-o", made]
            for (source, more), made in zip(files.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as threads:
            list(threads.map(_run, commands))
        # Link aside and rename: a running server keeps the file it has mapped.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
            link = [*compiler, "-shared", *sanitizers, *objects, "-o", str(fresh)]
            _run([*link, "-lm", "-pthread"])
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)


def _units() -> Units:
    names = ("portable", "fast_portable", "dispatch", "decoder", "pool")
    units: Units = {name: [] for name in names}
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


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        errors = [line for line in lines if "error" in line]
        raise BuildFailed(f"{command[0]} failed: {(errors or lines)[0]}")
    return done.stdout


if __name__ == "__main__":
    built = build()
    if built is None:
        sys.exit((Path(__file__).parent / REASON).read_text().strip())
    print(built)
