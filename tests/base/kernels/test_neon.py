"""The C library for Arm, cross-compiled and run in an emulator; against_formulas.c is what runs.

Needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu and qemu-user-static).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from base.kernels import build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HERE = Path(__file__).parent
CROSS = "aarch64-linux-gnu-gcc"


def program(compiler: str, machine: str, folder: Path) -> Path:
    """against_formulas.c with the sources and flags that `build` has for a machine."""
    made = folder / "against_formulas"
    objects = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(platform, "machine", lambda: machine)
        units = build._units()
    for name, extra in units.items():
        objects.append(str(folder / f"{name}.o"))
        source = str(build.SOURCES / f"{name}.c")
        run([compiler, *build._FLAGS, *extra, "-c", source, "-o", objects[-1]])
    flags = ["-O1", "-std=gnu11", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    source = str(HERE / "against_formulas.c")
    run(
        [
            compiler,
            *flags,
            f"-I{build.SOURCES}",
            "-static",
            source,
            *objects,
            "-lm",
            "-o",
            str(made),
        ]
    )
    return made


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def for_arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The emulator and the program."""
    found = (shutil.which(name) for name in ("qemu-aarch64-static", "qemu-aarch64"))
    emulator = next((path for path in found if path), None)
    if not emulator or not shutil.which(CROSS):
        pytest.skip(f"no {CROSS} and qemu-aarch64 here")
    return [emulator, str(program(CROSS, "aarch64", tmp_path_factory.mktemp("arm")))]


@pytest.mark.parametrize(("cpu", "products"), [("max", "neon"), ("cortex-a53", "portable")])
def test_arm(cpu: str, products: str, for_arm: list[str]) -> None:
    """A processor with the dot product, and one without."""
    emulator, checks = for_arm
    said = run([emulator, "-cpu", cpu, checks])
    assert said.startswith(f"portable, fast products {products}\n"), said
    assert said.count(" 0 wrong") == 5, said


def test_the_program_itself_on_this_machine(tmp_path: Path) -> None:
    compiler = os.environ.get("CC", "cc")
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    said = run([str(program(compiler, platform.machine(), tmp_path))])
    assert said.count(" 0 wrong") == 5, said
