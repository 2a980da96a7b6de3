"""Between the server and a process of `nibble train`: it confines itself, then becomes it.

Here and not between fork and exec of the server, which has threads. Lowest priority for processor
and disk; a bound on the memory that it may write to (mapped weights and libraries, and the address
space that torch and CUDA reserve without using it, do not count); and an end with the server's.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
# -I: neither PYTHON* variables nor the working directory decide what is imported.
NIBBLE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from service.cli import main; main()"


def main() -> None:
    """sys.argv[1]: JSON of `root`, `arguments`, `parent`, `nice`, `memory_bytes`."""
    given = json.loads(sys.argv[1])
    confine(given)
    arguments = [sys.executable, "-I", "-c", NIBBLE, given["root"], *given["arguments"]]
    os.execv(sys.executable, arguments)


def confine(given: dict[str, Any]) -> None:
    _die_with(given["parent"])
    os.nice(given["nice"])
    _idle_disk()
    _cap(resource.RLIMIT_CORE, 0)
    if given["memory_bytes"]:
        # RLIMIT_DATA counts private writable memory; macOS has it and does not enforce it.
        _cap(resource.RLIMIT_DATA, given["memory_bytes"])


def _die_with(parent: int) -> None:
    """Killed when the server is, whatever way it ends. Linux; elsewhere the next server waits for
    what is left of the last one's (see `service.jobs.runner`)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != parent:  # it went before that call
        os._exit(1)


def _idle_disk() -> None:
    """Read and write when nobody else does, where the system can."""
    if sys.platform != "linux":
        return
    import psutil

    with suppress(psutil.Error, OSError, ValueError):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def _cap(what: int, amount: int) -> None:
    """Set a limit, never above the one that is there already."""
    hard = resource.getrlimit(what)[1]
    most = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(what, (most, most))
