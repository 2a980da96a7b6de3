"""Blobs: immutable files addressed by the sha-256 of their bytes.

    stage    copy into a temporary file, hashing; nobody sees it
    send     what takes long of publishing
    publish  make it durable under its address
    discard  forget a staged file

A blob is only bytes: the catalog's row is what makes an adapter visible.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from adapters.errors import StoreFull, StoreUnavailable, TooLarge
from adapters.limits import MIB

if TYPE_CHECKING:
    from typing_extensions import Buffer

ADDRESS = re.compile(r"[0-9a-f]{64}")
PIECE = MIB

Step = Callable[[str], None]


def no_step(name: str) -> None:
    """Tests put a fault here: it is called after each step of a write."""
    del name


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """A complete copy in a temporary file. `file` holds its lock: a sweep leaves it alone."""

    path: Path
    sha256: str
    nbytes: int
    file: IO[bytes]


class BlobStore(Protocol):
    """Where weights lie. All methods raise StoreUnavailable when the disk or the network fails."""

    def stage(self, source: int, limit: int) -> StagedBlob:
        """Copy an open file (from its start), at most `limit` bytes, else TooLarge."""

    def send(self, staged: StagedBlob) -> None:
        """What takes long of `publish`, and needs no lock: without a row a sweep may undo it."""

    def publish(self, staged: StagedBlob) -> None:
        """Durable and complete under its address when this returns."""

    def discard(self, staged: StagedBlob) -> None: ...

    def local_path(self, sha256: str) -> Path:
        """A local file with the blob's bytes; FileNotFoundError where there is no such blob."""

    def delete(self, sha256: str) -> None: ...

    def addresses(self, older_than: float) -> list[str]:
        """Blobs last written before `older_than` (seconds since the epoch)."""

    def sweep(self, older_than: float, needed: Set[str]) -> list[str]:
        """Remove temporary files that no process holds, and copies of blobs that are not needed;
        the names of the former."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Held while blobs and rows change together."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn OSError into StoreFull or StoreUnavailable."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreUnavailable
        raise kind(f"{what}: {error.strerror or error}") from error


def check_address(sha256: str) -> str:
    """The address itself, when it is one: nothing else may become part of a path."""
    if not ADDRESS.fullmatch(sha256):
        raise ValueError(f"{sha256[:80]!r} is not a blob's address: 64 lower-case hex digits")
    return sha256


class LocalBlobs:
    """Blobs in a directory: `blobs/ab/abcd…`, temporary files in `tmp/` on the same file system."""

    def __init__(self, root: Path, step: Step = no_step) -> None:
        self._blobs = root / "blobs"
        self._staging = root / "tmp"
        self._step = step
        self._mutex = threading.RLock()
        self._depth = 0
        with disk_errors(f"cannot create the store in {root}"):
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            self._lock_file = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _sync_directory(root)
        for parent in root.absolute().parents[:2]:  # may be new too, or not ours to read
            with (
                disk_errors(f"cannot create the store in {root}"),
                suppress(PermissionError),
            ):
                _sync_directory(parent)

    def stage(self, source: int, limit: int) -> StagedBlob:
        return self.stage_pieces(_pieces_of(source), limit)

    def stage_pieces(self, pieces: Iterable[Buffer], limit: int) -> StagedBlob:
        """`stage` for bytes as they come."""
        path = self._staging / uuid.uuid4().hex
        with disk_errors("cannot write a temporary file"):
            file = path.open("xb", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._step("created")
                sha256, nbytes = self._copy(pieces, file, limit)
                os.fsync(file.fileno())
                self._step("synced")
            except BaseException:
                file.close()
                with suppress(OSError):  # the next sweep finds it; why it failed is worth more
                    path.unlink(missing_ok=True)
                raise
        return StagedBlob(path, sha256, nbytes, file)

    def _copy(self, pieces: Iterable[Buffer], target: IO[bytes], limit: int) -> tuple[str, int]:
        hashed, done = hashlib.sha256(), 0
        for piece in pieces:
            view = memoryview(piece)
            done += len(view)
            if done > limit:
                raise TooLarge(f"more than {limit} bytes", "weights")
            hashed.update(view)
            while view:  # a write may be short, on a full disk for one
                view = view[target.write(view) :]
            self._step("written")
        return hashed.hexdigest(), done

    def send(self, staged: StagedBlob) -> None:
        """It is on the right file system already."""

    def publish(self, staged: StagedBlob) -> None:
        final = self._address(staged.sha256)
        with disk_errors("cannot publish a blob"):
            final.parent.mkdir(exist_ok=True)
            _sync_directory(self._blobs)  # also where it was: who made it may not have come so far
            os.replace(staged.path, final)
            self._step("renamed")
            _sync_directory(final.parent)
            self._step("directory synced")
            staged.file.close()

    def discard(self, staged: StagedBlob) -> None:
        with suppress(OSError):  # the next sweep finds it
            staged.path.unlink(missing_ok=True)
        staged.file.close()

    def local_path(self, sha256: str) -> Path:
        path = self._address(sha256)
        if not path.is_file():
            raise FileNotFoundError(sha256)
        return path

    def delete(self, sha256: str) -> None:
        with disk_errors("cannot delete a blob"):
            self._address(sha256).unlink(missing_ok=True)

    def addresses(self, older_than: float) -> list[str]:
        return sorted(path.name for path, found in self.files() if found.st_mtime < older_than)

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Every blob's file; one that goes meanwhile is not there."""
        files: list[tuple[Path, os.stat_result]] = []
        with disk_errors("cannot list the blobs"):
            for path in self._blobs.glob("*/*"):
                if ADDRESS.fullmatch(path.name):
                    with suppress(FileNotFoundError):
                        files.append((path, path.stat()))
        return files

    def sweep(self, older_than: float, needed: Set[str] = frozenset()) -> list[str]:
        """There are no copies here."""
        with disk_errors("cannot sweep the temporary files"):
            orphans = [path for path in self._staging.iterdir() if self._orphan(path, older_than)]
            for path in orphans:
                path.unlink(missing_ok=True)
            return sorted(path.name for path in orphans)

    def _orphan(self, path: Path, older_than: float) -> bool:
        """Nobody holds its lock: the process that wrote it is gone."""
        if path.stat().st_mtime >= older_than:
            return False
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._mutex:  # threads; the file lock is for other processes on the same directory
            self._depth += 1
            try:
                if self._depth == 1:
                    fcntl.flock(self._lock_file, fcntl.LOCK_EX)
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _address(self, sha256: str) -> Path:
        return self._blobs / check_address(sha256)[:2] / sha256


def _pieces_of(source: int) -> Iterator[bytes]:
    """An open file from its start."""
    done = 0
    while piece := os.pread(source, PIECE, done):
        yield piece
        done += len(piece)


def _sync_directory(path: Path) -> None:
    """A rename is durable only when its directory is."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
