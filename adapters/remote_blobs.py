"""Blobs in an object store (S3 and whatever else obstore speaks), with local copies.

A put is atomic there, so no rename is needed. `send` brings a blob before the store is held, so no
other replica's write waits for it. It has no row yet, and a replica that starts may sweep it: so
`publish`, while the store is held, looks whether it is still there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from adapters.blobs import BlobStore, LocalBlobs, StagedBlob, Step, check_address, no_step
from adapters.errors import StoreUnavailable

log = logging.getLogger(__name__)

CACHE_BYTES = 16 << 30
RETRY_SECONDS = 30  # what an object store may take to come back, for one operation
IN_USE_SECONDS = 60.0  # who asked for a copy has opened it by then


class RemoteBlobs:
    """Staged files and copies lie in `cache`. Copies that were not asked for longest leave once
    there are more than `max_cache_bytes`, and those of deleted blobs with the next sweep."""

    def __init__(
        self, remote: Any, cache: Path, step: Step = no_step, max_cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._remote = remote
        self._cache = LocalBlobs(cache, step)
        self._max_cache_bytes = max_cache_bytes
        self._evicting = threading.Lock()

    def stage(self, source: int, limit: int) -> StagedBlob:
        return self._cache.stage(source, limit)

    def send(self, staged: StagedBlob) -> None:
        with _network_errors():
            # The same address is the same bytes: to write it again changes nothing.
            self._remote.put(_key(staged.sha256), staged.path)

    def publish(self, staged: StagedBlob) -> None:
        if not self._is_there(staged.sha256):  # swept since it was sent
            self.send(staged)
        self._keep(staged)

    def discard(self, staged: StagedBlob) -> None:
        self._cache.discard(staged)

    def local_path(self, sha256: str) -> Path:
        with suppress(FileNotFoundError):
            path = self._cache.local_path(sha256)
            os.utime(path)  # it was asked for now, so it stays
            return path
        self._fetch(sha256)
        return self._cache.local_path(sha256)

    def _fetch(self, sha256: str) -> None:
        with _network_errors():
            found = self._remote.get(_key(sha256))
            staged = self._cache.stage_pieces(_pieces(found), found.meta["size"])
        if staged.sha256 != sha256:
            self._cache.discard(staged)
            raise StoreUnavailable(f"blob {sha256} came back with sha-256 {staged.sha256}")
        self._keep(staged)

    def _keep(self, staged: StagedBlob) -> None:
        self._cache.publish(staged)
        self._evict()

    def _evict(self) -> None:
        with self._evicting:
            copies = sorted(self._cache.files(), key=lambda copy: copy[1].st_mtime)
            over = sum(found.st_size for _, found in copies) - self._max_cache_bytes
            for path, found in copies:
                if over <= 0 or time.time() - found.st_mtime < IN_USE_SECONDS:
                    return
                self._cache.delete(path.name)
                over -= found.st_size

    def delete(self, sha256: str) -> None:
        with _network_errors():
            self._remote.delete(_key(sha256))
        self._cache.delete(sha256)

    def addresses(self, older_than: float) -> list[str]:
        with _network_errors():
            rows = [row for page in self._remote.list("blobs") for row in page]
        old = (row["path"] for row in rows if row["last_modified"].timestamp() < older_than)
        return sorted(path.rpartition("/")[2] for path in old)

    def sweep(self, older_than: float, needed: Set[str]) -> list[str]:
        for path, found in self._cache.files():
            if path.name not in needed and found.st_mtime < older_than:
                self._cache.delete(path.name)
        return self._cache.sweep(older_than)

    def exclusive(self) -> AbstractContextManager[None]:
        return self._cache.exclusive()

    def _is_there(self, sha256: str) -> bool:
        with _network_errors(), suppress(FileNotFoundError):
            self._remote.head(_key(sha256))
            return True
        return False


def open_blobs(
    url: str, cache: Path | None = None, step: Step = no_step, max_cache_bytes: int = CACHE_BYTES
) -> BlobStore:
    """The blobs at a directory or at a URL that obstore knows (`s3://bucket/prefix`).

    A remote store wants `cache`, a local directory for copies of at most `max_cache_bytes`.
    Credentials, region and endpoint come from the variables of whoever serves the bucket
    (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT`, …).
    """
    if "://" not in url:
        return LocalBlobs(Path(url), step)
    if url.startswith("file://"):
        return LocalBlobs(Path(url2pathname(urlsplit(url).path)), step)
    if cache is None:
        raise ValueError(f"the blob store {url} wants a local cache directory")
    import obstore.store

    retry = {"retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    remote = obstore.store.from_url(url, retry_config=retry)
    return RemoteBlobs(remote, cache, step, max_cache_bytes)


def _pieces(found: Any) -> Iterator[Any]:
    """What is wrong with the network is not the disk's fault, whose errors surround this."""
    with _network_errors():
        yield from found.stream()


def _key(sha256: str) -> str:
    return f"blobs/{check_address(sha256)[:2]}/{sha256}"


@contextmanager
def _network_errors() -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        log.error("the object store failed: %s", error)  # with its address, which no caller needs
        kind = type(error).__name__
        raise StoreUnavailable(f"the object store failed ({kind}); the log says more") from error
