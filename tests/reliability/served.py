"""A server in a process of its own, `nibble serve` with two things more: it writes what only the
inside knows (asyncio's tasks) to a file, and SIGUSR1 breaks its engine's next step.

    served.py REPORT serve --base …
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at a process."""

    seconds: float  # since it was started
    memory: int  # bytes resident
    descriptors: int
    threads: int
    tasks: int


class Served:
    """The process from outside. Its log, a line of JSON each, is `log`."""

    def __init__(self, work: Path, flags: Sequence[str], environment: Mapping[str, str]) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.log, self._report = work / "log", work / "report"
        self._report.write_text("{}")
        own = {"NIBBLE_HOME": str(work / "home"), "NIBBLE_ADAPTERS": "none"}
        command = (sys.executable, "-m", "tests.reliability.served", str(self._report), "serve")
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                (*command, "--port", "0", "--log-format", "json", *flags),
                cwd=ROOT,
                env={**os.environ, **own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.port = self._listening()
            self.until(self._ready)
        except BaseException:
            self.kill()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def look(self) -> Seen:
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return Seen(
            time.monotonic() - self.started,
            1024 * int(status["VmRSS"].split()[0]),
            len(list((proc / "fd").iterdir())),
            int(status["Threads"]),
            json.loads(self._report.read_text()).get("tasks", 0),
        )

    def cpu_seconds(self) -> float:
        return _cpu_seconds(Path(f"/proc/{self.process.pid}/stat"))

    def loop_seconds(self) -> float:
        """CPU time of the event loop's thread, which is the first one."""
        pid = self.process.pid
        return _cpu_seconds(Path(f"/proc/{pid}/task/{pid}/stat"))

    def break_engine(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def until(self, condition: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the server did not come up:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    def _listening(self) -> int:
        self.until(lambda: any(line.get("event") == "listening" for line in self._lines()))
        url: str = [line["url"] for line in self._lines() if line.get("event") == "listening"][-1]
        return int(url.rpartition(":")[2])

    def _ready(self) -> bool:
        return any(line.get("event") == "ready" for line in self._lines())


def _cpu_seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(work: Path, *flags: str, **environment: str) -> Iterator[Served]:
    """A server until the block ends."""
    found = Served(work, flags, environment)
    try:
        yield found
    finally:
        found.kill()


@contextmanager
def scratch(base: str | None = None) -> Iterator[tuple[Path, str]]:
    """A directory to serve from, gone afterwards, and a base: the one that is given, by its
    directory or name, or else a tiny random one."""
    with tempfile.TemporaryDirectory() as directory:
        if base is None:
            from tests.oracle import make_base  # it brings torch

            base = str(make_base(Path(directory) / "base", "llama"))
        yield Path(directory), base


# In the process ----------------------------------------------------------------------------------


def main() -> None:
    report = Path(sys.argv.pop(1))
    _tell_tasks(report)
    signal.signal(signal.SIGUSR1, lambda *_: _break_engine())
    from service import cli

    cli.main()


def _tell_tasks(report: Path) -> None:
    from service.app import Server

    tick, descriptor = Server.on_tick, os.open(report, os.O_WRONLY)

    async def telling(self: Server, counter: int) -> bool:
        if counter % 10 == 0:
            # In place: a rename makes the system write, and the loop wait for it, milliseconds.
            found = json.dumps({"tasks": len(asyncio.all_tasks())})
            os.pwrite(descriptor, found.ljust(32).encode(), 0)
        return await tick(self, counter)

    Server.on_tick = telling  # type: ignore[method-assign]


def _break_engine() -> None:
    from service.engine.model_runner import ModelRunner

    def broken(*_: Any) -> None:
        raise RuntimeError("broken on purpose")

    ModelRunner.run = broken  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    main()
