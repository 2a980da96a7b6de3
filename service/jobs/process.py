"""One process of `nibble train` in a job's directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
_LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv.pop(1));"
    " from service.jobs.launcher import main; main()"
)
# What such a process may know of the server's surroundings: no keys, no tokens.
_INHERITED = (
    *("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    *("XDG_CACHE_HOME", "NIBBLE_HOME", "NIBBLE_NATIVE", "NIBBLE_ISA"),
)
SAID_BYTES = 64 << 10  # of what it printed, looked at when it fails
REFUSED = 2  # exit status of what the user can put right
STOPPED = 130  # and of a run that was asked to stop and left a checkpoint


@dataclass(frozen=True, slots=True)
class Confinement:
    """What a process of training may take."""

    nice: int = 19
    threads: int = 1
    memory_bytes: int | None = None
    nibble: Sequence[str] = ()  # instead of `nibble`; for tests


class TrainProcess:
    """Started at once. Its output goes to a file, and is told when it fails."""

    def __init__(
        self,
        arguments: Sequence[str],
        directory: Path,
        confinement: Confinement,
        held: Sequence[int] = (),
    ) -> None:
        """`held`: descriptors that it keeps open for as long as it lives."""
        given = {
            "root": str(ROOT),
            "arguments": list(arguments),
            "parent": os.getpid(),
            "nice": confinement.nice,
            "memory_bytes": confinement.memory_bytes,
        }
        command = [sys.executable, "-I", "-c", _LAUNCH, str(ROOT), json.dumps(given)]
        if confinement.nibble:
            command = [*confinement.nibble, *arguments]
        self._output: IO[bytes] = (directory / "output.txt").open("w+b")
        try:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=_environment(confinement.threads),
                pass_fds=tuple(held),
                start_new_session=True,  # Ctrl-C in the server's terminal is for the server
            )
        except BaseException:
            self._output.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status, or None where it still runs after `seconds`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self) -> None:
        """It ends after its step, with a checkpoint."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def end(self, patience: float) -> int:
        """Ask it to stop, and kill it where it does not within `patience` seconds."""
        self.ask_to_stop()
        status = self.wait(max(patience, 0.0))
        if status is None:
            self.kill()
            status = self._process.wait()
        return status

    def said(self) -> str:
        """The end of what it printed."""
        size = os.fstat(self._output.fileno()).st_size
        start = max(0, size - SAID_BYTES)
        return os.pread(self._output.fileno(), SAID_BYTES, start).decode(errors="replace")

    def close(self) -> None:
        if self.poll() is None:
            self.kill()
            self._process.wait()
        self._output.close()

    def _send(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)


def answer(
    arguments: Sequence[str],
    directory: Path,
    confinement: Confinement,
    *,
    seconds: float,
    held: Sequence[int] = (),
) -> tuple[int, Any, str]:
    """Run a command of `nibble train` that prints one JSON document on its last line: its exit
    status, the document (None where it printed none), and what it said. Raises TimeoutError."""
    process = TrainProcess(arguments, directory, confinement, held)
    try:
        status = process.wait(seconds)
        if status is None:
            raise TimeoutError(f"nibble {' '.join(arguments[:2])}: longer than {seconds:g} s")
        said = process.said()
    finally:
        process.close()
    return status, document(said), said


def document(said: str) -> Any:
    """The JSON object that is the last line of an output."""
    lines = said.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    except ValueError:
        return None


def _environment(threads: int) -> dict[str, str]:
    found = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    hub = {name: value for name, value in os.environ.items() if name in ("HF_HOME", "HF_HUB_CACHE")}
    return {
        **found,
        **hub,
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",  # the base is here: the server has loaded it
        "HF_DATASETS_OFFLINE": "1",
        "COLUMNS": "1000",  # what it prints is read by lines
    }
