"""Hold every process of a run to an instruction set below the best that this CPU has.

So that one machine can tell how all peers compare on a lesser one. What is set is read when a
library is loaded, so it holds for the processes that are started afterwards: all that measure.
bitsandbytes has no such switch; the peers over it hold it by cpuid.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from base.machine import Machine
from service.bench.llama_peer import missing, sets_of

VARIABLES = {
    "avx2": {
        "NIBBLE_ISA": "avx2",  # our kernels
        "ATEN_CPU_CAPABILITY": "avx2",  # torch's own loops
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # torch's products of floats
        "ONEDNN_MAX_CPU_ISA": "AVX2",  # torch's products of bytes
    }
}
HOW = (
    "build llama.cpp with -DGGML_NATIVE=OFF; name its llama-server with --llama-server, and the "
    "directory of its libllama.so to llama-cpp-python by LLAMA_CPP_LIB_PATH; or say --no-llama"
)
_PYTHON = (
    sys.executable,
    "-c",
    "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())",
)
BEYOND = ("avx512", "avx_vnni", "amx")  # how what is beyond AVX2 begins
_SECONDS = 60


class CannotHold(ValueError):
    """This CPU lacks the instruction set, or a peer was built for more."""


def hold(isa: str, machine: Machine, *, llama: bool, server: Path | None) -> None:
    """Whatever is started from now on uses no more than `isa`. Raises CannotHold.

    llama.cpp is what it was built to be, so it is asked first; where it is not installed, or the
    CPU has no more to hold it to, there is nothing to ask.
    """
    if isa not in VARIABLES:
        raise CannotHold(f"got {isa}; {' or '.join(VARIABLES)} is known")
    if isa not in machine.features:
        raise CannotHold(f"this CPU has no {isa}, but {', '.join(machine.features) or 'none'}")
    if llama and not missing():
        _check("llama-cpp-python", _said(_PYTHON))
    if llama and server is not None:
        _check(str(server), server_system(server))
    os.environ.update(VARIABLES[isa])


def server_system(server: Path) -> str:
    """What llama-server says of itself: it does before it finds that this is no model."""
    return _said([str(server), "--model", os.devnull, "--log-verbosity", "4"])


def _check(name: str, system: str) -> None:
    found = sets_of(system)
    if "AVX2" not in found:
        raise CannotHold(f"{name} does not say what it was built for: {system[-500:]!r}; {HOW}")
    if beyond := [each for each in found if each.lower().startswith(BEYOND)]:
        raise CannotHold(f"{name} was built for {', '.join(beyond)}: {HOW}")


def _said(command: Sequence[str]) -> str:
    """Both outputs of a short command; why there are none."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()
