"""Who did what to which digest: lines that are only ever appended, each with the hash of the one
before.

Every request that changes something, every reply (with the digests that served it) and everything
that was forbidden is a line; no prompt, output, variable, name of a file or secret ever is. A line
taken out, put in or changed breaks the chain, and `nibble audit verify` says where; only the newest
lines can be cut off unseen, so ship the last hash elsewhere where that matters. Lines are written
soon after their request, off its road: what ends the process takes the last tenths of a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

START = "0" * 64  # the hash before the first line
WRITE_SECONDS = 0.2
SEGMENT_BYTES = 64 << 20
UNWRITTEN = 100_000  # lines that wait for a disk that fails
TAIL_BYTES = 1 << 16  # longer than any line
MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found: so many lines hold together, and where they do not."""

    lines: int
    last: str  # the newest hash
    broken: str | None = None


class AuditLog:
    """One home's lines, for any number of threads and processes. `close` writes what waits."""

    def __init__(self, directory: Path, max_bytes: int = 1 << 30) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._waiting: list[dict[str, Any]] = []
        self._listing = threading.Lock()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, action: str, **said: Any) -> None:
        """One line: what was done, and of what; empty values are left out. Returns at once."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "action": action}
        line |= {key: _bounded(value) for key, value in said.items() if value}
        with self._listing:
            self._waiting.append(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="nibble-audit", daemon=True)
                self._thread.start()
        self._wake.set()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def flush(self) -> None:
        """Write what waits, durably. A disk that fails is logged, and the lines wait on."""
        with self._writing:
            with self._listing:
                batch, self._waiting = self._waiting, []
            if not batch:
                return
            try:
                self._append(batch)
            except OSError as error:
                log.error("audit lines could not be written: %s", error)
                with self._listing:
                    self._waiting = [*batch, *self._waiting][-UNWRITTEN:]

    def _main(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._wake.clear()
            self.flush()
            self._closed.wait(WRITE_SECONDS)

    def _append(self, batch: list[dict[str, Any]]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            files = segments(self._directory)
            path = files[-1] if files else self._directory / _segment(1)
            number, previous = _end_of(files)
            if path.exists() and path.stat().st_size > SEGMENT_BYTES:
                path = self._directory / _segment(_index(path) + 1)
                self._drop_oldest(files)
            lines = []
            for said in batch:
                number += 1
                line = {"n": number, **said, "previous": previous}
                previous = _hash(line)
                lines.append(json.dumps({**line, "hash": previous}, ensure_ascii=False))
            with path.open("ab") as file:
                file.write(("\n".join(lines) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

    def _drop_oldest(self, files: list[Path]) -> None:
        """Whole segments, the oldest first, until the rest is within `max_bytes`."""
        while len(files) > 1 and sum(path.stat().st_size for path in files) > self._max_bytes:
            files.pop(0).unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def segments(directory: Path) -> list[Path]:
    """The files, oldest first."""
    return sorted(directory.glob("audit-*.jsonl"))


def lines(directory: Path) -> Iterator[dict[str, Any]]:
    """Every line, oldest first; one that is torn or no JSON is `{"broken": …}`."""
    for path in segments(directory):
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = json.loads(raw)
                except ValueError:
                    line = None
                if not isinstance(line, dict):
                    line = {"broken": f"{path.name}, line {number}: it is no line of this log"}
                yield line


def verify(directory: Path) -> Verdict:
    """Whether every line is as it was written, and none is missing between two others."""
    count, number = 0, 0
    previous: str | None = None
    for line in lines(directory):
        if "broken" in line:
            return Verdict(count, previous or START, line["broken"])
        said = {key: value for key, value in line.items() if key != "hash"}
        where = f"line {line.get('n')} of {line.get('time')}"
        if line.get("hash") != _hash(said):
            return Verdict(count, previous or START, f"{where}: it was changed")
        if previous is not None and (line["previous"], line["n"]) != (previous, number + 1):
            return Verdict(count, previous, f"{where}: what came before it is missing, or another")
        count, number, previous = count + 1, line["n"], line["hash"]
    return Verdict(count, previous or START)


def find(directory: Path, request_id: str) -> list[dict[str, Any]]:
    """The lines of one request."""
    return [line for line in lines(directory) if line.get("request") == request_id]


def _end_of(files: list[Path]) -> tuple[int, str]:
    """Number and hash of the last line. What a crash tore off its end is taken away."""
    for path in reversed(files):
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - TAIL_BYTES)
            file.seek(start)
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):
                file.truncate(start + whole)
        complete = tail[:whole].splitlines()
        if complete:
            last = json.loads(complete[-1])
            return int(last["n"]), str(last["hash"])
    return 0, START


def _hash(line: Mapping[str, Any]) -> str:
    canonical = json.dumps(line, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _segment(index: int) -> str:
    return f"audit-{index:08d}.jsonl"


def _index(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _bounded(value: Any) -> Any:
    """Short texts and numbers, and lists and mappings of them."""
    if isinstance(value, Mapping):
        return {str(key)[:MAX_TEXT]: _bounded(one) for key, one in list(value.items())[:16]}
    if isinstance(value, list | tuple):
        return [_bounded(one) for one in value[:64]]
    return value if isinstance(value, bool | int | float) else str(value)[:MAX_TEXT]
