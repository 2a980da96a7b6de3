"""Files to text, in processes of their own: short of memory, of time and of rights.

A stranger's file is read by `service.retrieval.parsing_child` first. If it makes the parser swell,
spin or crash, that one file is refused; the child is started again for those that follow.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base.extras import install
from service.retrieval.errors import CollectionUnavailable, DocumentRefused, NotInstalled
from service.retrieval.parsing_child import MEMORY_EXIT

MIB = 1 << 20
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
    ".docx": "docx",
    ".csv": "csv",
    ".jsonl": "jsonl",
}
ROOT = Path(__file__).resolve().parents[2]
# -I: neither PYTHON* variables nor the working directory decide what is imported.
COMMAND = (
    sys.executable,
    "-I",
    "-c",
    "import sys; sys.path.insert(0, sys.argv[1]);"
    " from service.retrieval.parsing_child import main; main()",
    str(ROOT),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """What reading one file may cost."""

    cpu_seconds: int = 60
    seconds: float = 300.0  # wall clock: how long a busy machine may take to give them
    memory_bytes: int = 1024 * MIB
    max_characters: int = 16 * MIB  # of text that comes out
    max_rows: int = 100_000  # of a .jsonl file


@dataclass(frozen=True, slots=True)
class Source:
    """A file on this disk, and the id that its document gets."""

    id: str
    path: Path
    format: str  # a value of FORMATS


@dataclass(frozen=True, slots=True)
class Parsed:
    """The text of one document; a .jsonl file has several, with metadata of their own."""

    id: str
    text: str
    metadata: dict[str, Any]


def format_of(name: str) -> str:
    """The format that a file's name promises. Raises DocumentRefused."""
    suffix = Path(name).suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise DocumentRefused(
            name, f"files of {suffix or 'no suffix'} are not read; read are {known}"
        )
    return FORMATS[suffix]


def parse(
    sources: Sequence[Source], limits: ParseLimits | None = None
) -> Iterator[list[Parsed] | DocumentRefused]:
    """The documents of each file, in order, or why the file is refused.

    Raises CollectionUnavailable where no process can be started, NotInstalled without the parser.
    """
    limits = limits or ParseLimits()
    left = list(sources)
    while left:
        with _Child(left, limits) as child:
            for source in list(left):
                found = child.next(source)
                left.pop(0)
                yield found
                if child.ended:
                    break


class _Child:
    """One process that reads several files, one after the other, and may die at any of them."""

    def __init__(self, sources: Sequence[Source], limits: ParseLimits) -> None:
        self._limits = limits
        self._late = False
        question = {
            "limits": asdict(limits),
            "files": [[s.id, os.fspath(s.path.absolute()), s.format] for s in sources],
        }
        try:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise CollectionUnavailable(f"no parser could be started: {error.strerror}") from error
        assert self._process.stdin
        try:
            with self._process.stdin as stdin:
                stdin.write(json.dumps(question).encode())
        except BrokenPipeError:
            pass  # it died before it had read all; its exit says why
        self.ended = False

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    def next(self, source: Source) -> list[Parsed] | DocumentRefused:
        """What the child says of its next file; it is killed when it takes too long."""
        assert self._process.stdout
        clock = threading.Timer(self._limits.seconds, self._expire)
        clock.start()
        try:
            line = self._process.stdout.readline()
        finally:
            clock.cancel()
        if not line.endswith(b"\n"):
            self.ended = True
            return DocumentRefused(source.id, self._death())
        answer = json.loads(line)
        if "missing" in answer:
            raise NotInstalled(
                f"reading files needs {answer['missing']}, which is not installed: run "
                f"`{install('rag')}`"
            )
        if "refused" in answer:
            return DocumentRefused(source.id, answer["refused"])
        return [Parsed(one["id"], one["text"], one["metadata"]) for one in answer["documents"]]

    def _expire(self) -> None:
        self._late = True
        self._process.kill()

    def _death(self) -> str:
        status = self._process.wait()
        limits = self._limits
        if self._late:
            return f"reading it did not end within {limits.seconds:g} s"
        if status == -signal.SIGXCPU:
            return f"reading it took more than {limits.cpu_seconds} s of processor time"
        if status == MEMORY_EXIT:
            return f"reading it needed more than {limits.memory_bytes} bytes of memory"
        log.warning("a parser ended with status %d", status)
        return f"its parser crashed (exit {status})"
