"""Who did what to which digest: lines that are only ever appended, each with the hash of the one
before.

Every request that changes something, every reply (with the digests that served it) and everything
that was forbidden is a line; no prompt, output, variable, name of a file or secret ever is. A line
taken out, put in or changed breaks the chain, and `nibble audit verify` says where. What is dropped
at the beginning, since the log is full, is said by a line. What is cut off at the end is noticed by
the server that wrote it; where none ran, by whoever kept a later hash, which a running server logs
now and then. Lines are written soon after their request, off its road: what ends the process takes
the last tenths of a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.access.caller import redacted

log = logging.getLogger(__name__)

START = "0" * 64  # the hash before the first line
WRITE_SECONDS = 0.2
TELL_SECONDS = 600.0  # how often the last hash is logged, where there are new lines
DROP, CUT = "audit drop", "audit cut"  # what is done to the log itself
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
        self.unwritten = 0  # lines that are not on the disk yet, what is being written too
        self.cuts = 0  # how often lines of ours were gone
        self._listing = threading.Lock()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._newest = (0, START)  # number and hash of the last line that was written here
        self._told = (time.monotonic(), START)

    def note(self, action: str, **said: Any) -> None:
        """One line: what was done, and of what; empty values are left out. Returns at once."""
        line = _said(action, **said)
        with self._listing:
            self._waiting.append(line)
            self.unwritten += 1
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
        self._tell()

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
                    self.unwritten = len(self._waiting)
                return
            with self._listing:
                self.unwritten -= len(batch)

    def _main(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._wake.clear()
            self.flush()
            if time.monotonic() - self._told[0] > TELL_SECONDS:
                self._tell()
            self._closed.wait(WRITE_SECONDS)

    def _tell(self) -> None:
        """Log the last hash, for whoever keeps logs elsewhere."""
        number, newest = self._newest
        if newest != self._told[1]:
            log.info("audit log: line %d has the hash %s", number, newest)
        self._told = (time.monotonic(), newest)

    def _append(self, batch: list[dict[str, Any]]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            files = segments(self._directory)
            path = files[-1] if files else self._directory / _segment(1)
            number, previous = _end_of(files)
            if self._was_cut(files, number):
                gone, newest = self._newest
                self.cuts += 1
                log.error("the audit log was cut: line %d, %s, is missing", gone, newest)
                batch = [_said(CUT, line=gone, missing=newest), *batch]
            full: list[Path] = []
            if path.exists() and path.stat().st_size > SEGMENT_BYTES:
                path = self._directory / _segment(_index(path) + 1)
                full = self._oldest(files)
                if full:
                    batch = [_said(DROP, through=_end_of(full)[0]), *batch]
            lines = []
            for said in batch:
                number += 1
                line = {"n": number, **said, "previous": previous}
                previous = _hash(line)
                lines.append(json.dumps({**line, "hash": previous}, ensure_ascii=False))
            with path.open("ab") as file:
                file.write(_bytes("\n".join(lines) + "\n"))
                file.flush()
                os.fsync(file.fileno())
            self._newest = (number, previous)
            for one in full:  # what was said first, and then done
                one.unlink()

    def _was_cut(self, files: list[Path], number: int) -> bool:
        """Whether a line that was written here is gone, or another stands in its place. Others may
        have written since."""
        mine, newest = self._newest
        if number < mine:
            return True
        near = (line for line in _tail(files[-1]) if line["n"] == mine) if mine else ()
        return any(line["hash"] != newest for line in near)

    def _oldest(self, files: list[Path]) -> list[Path]:
        """Whole segments, the oldest first, without which the rest is within `max_bytes`."""
        sizes = [path.stat().st_size for path in files]
        return [path for n, path in enumerate(files[:-1]) if sum(sizes[n:]) > self._max_bytes]

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
                broken = {"broken": f"{path.name}, line {number}: it is no line of this log"}
                yield _read(raw) or broken


def verify(directory: Path, kept: str | None = None) -> Verdict:
    """Whether every line is as it was written and none is missing, but for what was dropped where
    the log was full. `kept`: a hash that was the last one before, which must be there still."""
    count, number, dropped = 0, 0, 0
    previous, seen = START, kept in (None, START)
    for line in lines(directory):
        if "broken" in line:
            return Verdict(count, previous, line["broken"])
        said = {key: value for key, value in line.items() if key != "hash"}
        where = f"line {line.get('n')} of {line.get('time')}"
        if line.get("hash") != _hash(said) or not isinstance(line.get("n"), int):
            return Verdict(count, previous, f"{where}: it was changed")
        first = count == 0
        if first:
            dropped = line["n"] - 1
        elif (line.get("previous"), line["n"]) != (previous, number + 1):
            return Verdict(count, previous, f"{where}: what came before it is missing, or another")
        if line.get("action") == CUT:
            gone = f"line {line.get('line')}, {line.get('missing')}, was cut off before it"
            return Verdict(count, previous, f"{where}: {gone}")
        if line.get("action") == DROP and line.get("through", 0) >= dropped:
            dropped = 0
        count, number, previous = count + 1, line["n"], line["hash"]
        seen = seen or previous == kept
    broken = None
    if dropped:
        broken = f"lines 1 to {dropped} are missing, and no line says that they were dropped"
    elif not seen:
        broken = f"no line has the hash {kept}: it was cut off, or dropped since"
    return Verdict(count, previous, broken)


def find(directory: Path, request_id: str) -> list[dict[str, Any]]:
    """The lines of one request."""
    return [line for line in lines(directory) if line.get("request") == request_id]


def _end_of(files: list[Path]) -> tuple[int, str]:
    """Number and hash of the last line that can be read. What a crash tore off its end is taken
    away; a whole line that cannot be read stays, for `verify` to show."""
    for path in reversed(files):
        _mend(path)
        if found := _tail(path):
            return found[-1]["n"], found[-1]["hash"]
    return 0, START


def _mend(path: Path) -> None:
    """Cut off what follows the last end of a line: of a line half written, or of a block that a
    power loss left empty."""
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - TAIL_BYTES)
            file.seek(start)
            whole = file.read(end - start).rfind(b"\n") + 1
            if whole:
                end = start + whole
                break
            end = start
        if end < size:
            file.truncate(end)


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last lines that can be read."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        found = [_read(raw) for raw in file.read().splitlines()]
    return [
        line
        for line in found
        if line and isinstance(line.get("n"), int) and isinstance(line.get("hash"), str)
    ]


def _read(raw: bytes) -> dict[str, Any] | None:
    """One line; None when it is none."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _said(action: str, **said: Any) -> dict[str, Any]:
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "action": action}
    return line | {key: _bounded(value) for key, value in said.items() if value}


def _hash(line: Mapping[str, Any]) -> str:
    canonical = json.dumps(line, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(_bytes(canonical)).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # half a character is a text of JSON too


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
    return value if isinstance(value, bool | int | float) else redacted(str(value))[:MAX_TEXT]
