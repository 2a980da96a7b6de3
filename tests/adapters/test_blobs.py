import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore.exceptions
import obstore.store
import pytest

from adapters.blobs import BlobStore, LocalBlobs, StagedBlob
from adapters.errors import StoreFull, StoreUnavailable, TooLarge
from adapters.remote_blobs import IN_USE_SECONDS, RemoteBlobs, open_blobs

TEXT = b"some weights" * 1000
SHA = hashlib.sha256(TEXT).hexdigest()
LATER = float("inf")


@contextmanager
def staged(blobs: BlobStore, path: Path, content: bytes = TEXT) -> Iterator[StagedBlob]:
    path.write_bytes(content)
    with path.open("rb") as file:
        blob = blobs.stage(file.fileno(), 10 << 20)
    try:
        yield blob
    finally:
        blobs.discard(blob)


def put(blobs: BlobStore, path: Path, content: bytes = TEXT) -> str:
    with staged(blobs, path, content) as blob:
        blobs.send(blob)
        blobs.publish(blob)
    return blob.sha256


@pytest.fixture(params=["local", "remote"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "local":
        return LocalBlobs(tmp_path / "store")
    return RemoteBlobs(obstore.store.MemoryStore(), tmp_path / "cache")


def test_a_published_blob_is_there_under_its_sha256(blobs: BlobStore, tmp_path: Path) -> None:
    assert put(blobs, tmp_path / "w") == SHA
    assert blobs.local_path(SHA).read_bytes() == TEXT
    assert blobs.addresses(LATER) == [SHA]
    assert put(blobs, tmp_path / "w") == SHA, "the same bytes may be published again"


def test_a_staged_blob_is_nowhere(blobs: BlobStore, tmp_path: Path) -> None:
    with staged(blobs, tmp_path / "w") as blob:
        assert (blob.sha256, blob.nbytes) == (SHA, len(TEXT))
        assert blobs.addresses(LATER) == []
        with pytest.raises(FileNotFoundError):
            blobs.local_path(SHA)
    assert not blob.path.exists()


def test_deletion(blobs: BlobStore, tmp_path: Path) -> None:
    put(blobs, tmp_path / "w")
    blobs.delete(SHA)
    assert blobs.addresses(LATER) == []
    with pytest.raises(FileNotFoundError):
        blobs.local_path(SHA)


def test_addresses_by_age(blobs: BlobStore, tmp_path: Path) -> None:
    put(blobs, tmp_path / "w")
    assert blobs.addresses(0.0) == []


def test_the_size_is_bounded_while_copying(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(TEXT)
    with (tmp_path / "w").open("rb") as file, pytest.raises(TooLarge):
        blobs.stage(file.fileno(), len(TEXT) - 1)
    assert blobs.sweep(LATER, frozenset()) == []


@pytest.mark.parametrize("address", ["../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", ""])
def test_nothing_but_an_address_becomes_a_path(blobs: BlobStore, address: str) -> None:
    with pytest.raises(ValueError, match="not a blob's address"):
        blobs.local_path(address)
    with pytest.raises(ValueError, match="not a blob's address"):
        blobs.delete(address)


def test_sweep_takes_what_no_living_process_holds(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    (tmp_path / "store/tmp/left").write_bytes(b"half")
    with staged(blobs, tmp_path / "w") as mine:
        assert LocalBlobs(tmp_path / "store").sweep(0.0) == []
        assert LocalBlobs(tmp_path / "store").sweep(LATER) == ["left"]
        assert mine.path.exists()
        mine.file.close()  # as the death of its process would
        assert blobs.sweep(LATER) == [mine.path.name]


def test_durable_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, rename, fsync of the directory: in this order and none left out."""
    blobs = LocalBlobs(tmp_path / "store")
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        events.append(f"fsync {path.relative_to(tmp_path / 'store').parts[0]}/{path.name[:2]}")
        fsync(fd)

    def recorded_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with staged(blobs, tmp_path / "w") as blob:
        assert events == [f"fsync tmp/{blob.path.name[:2]}"]
        events.clear()
        blobs.publish(blob)
    assert events == ["fsync blobs/bl", "rename", f"fsync blobs/{SHA[:2]}"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, StoreFull), (errno.EIO, StoreUnavailable)]
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], call: str
) -> None:
    blobs = LocalBlobs(tmp_path / "store")

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind):
        put(blobs, tmp_path / "w")
    assert list((tmp_path / "store/tmp").iterdir()) == []
    assert blobs.addresses(LATER) == []


def test_exclusive_is_one_at_a_time_and_reentrant(tmp_path: Path) -> None:
    one, two = LocalBlobs(tmp_path / "store"), LocalBlobs(tmp_path / "store")
    inside: list[int] = []

    def work(number: int) -> int:
        blobs = one if number % 2 else two
        with blobs.exclusive(), blobs.exclusive():
            inside.append(number)
            most = len(inside)
            inside.remove(number)
        return most

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(200))) == {1}


def test_a_remote_blob_is_fetched_and_checked(tmp_path: Path) -> None:
    remote = obstore.store.MemoryStore()
    put(RemoteBlobs(remote, tmp_path / "one"), tmp_path / "w")
    elsewhere = RemoteBlobs(remote, tmp_path / "two")
    assert elsewhere.local_path(SHA).read_bytes() == TEXT
    remote.put(f"blobs/{SHA[:2]}/{SHA}", b"other bytes")
    with pytest.raises(StoreUnavailable, match="came back with sha-256"):
        RemoteBlobs(remote, tmp_path / "three").local_path(SHA)
    assert elsewhere.local_path(SHA).read_bytes() == TEXT


def test_what_is_swept_on_its_way_is_brought_again(tmp_path: Path) -> None:
    """Another replica starts between `send` and `publish`, and finds no row for the blob."""
    remote = obstore.store.MemoryStore()
    blobs, starting = (RemoteBlobs(remote, tmp_path / name) for name in ("one", "two"))
    with staged(blobs, tmp_path / "w") as blob:
        blobs.send(blob)
        assert starting.addresses(LATER) == [SHA]
        starting.delete(SHA)
        blobs.publish(blob)
    assert starting.local_path(SHA).read_bytes() == TEXT


def test_copies_leave_in_order_of_last_use(tmp_path: Path) -> None:
    remote, contents = obstore.store.MemoryStore(), [bytes([n]) * 1000 for n in range(4)]
    writer = RemoteBlobs(remote, tmp_path / "writer")
    addresses = [put(writer, tmp_path / "w", content) for content in contents]
    cache = tmp_path / "cache"
    blobs = RemoteBlobs(remote, cache, max_cache_bytes=2000)

    def copies() -> set[int]:
        files = {path.name for path in (cache / "blobs").glob("*/*")}
        return {n for n, address in enumerate(addresses) if address in files}

    def used(number: int, seconds_ago: float) -> None:
        path = blobs.local_path(addresses[number])
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds_ago))

    used(0, 3 * IN_USE_SECONDS)
    used(1, 2 * IN_USE_SECONDS)
    used(0, 0)  # again, and now
    used(2, 0)
    assert copies() == {0, 2}, "1 was asked for longest ago"
    used(3, 0)
    assert copies() == {0, 2, 3}, "whoever asked just now may be about to open them"
    assert [blobs.local_path(each).read_bytes() for each in addresses] == contents


def test_copies_of_what_another_replica_deleted_go_with_a_sweep(tmp_path: Path) -> None:
    remote = obstore.store.MemoryStore()
    one, two = (RemoteBlobs(remote, tmp_path / name) for name in ("one", "two"))
    put(one, tmp_path / "w")
    kept = put(one, tmp_path / "w", b"others")
    paths = [two.local_path(SHA), two.local_path(kept)]
    one.delete(SHA)
    two.sweep(LATER, {kept})
    assert [path.exists() for path in paths] == [False, True]


class _Broken:
    """A network that ends in the middle of a blob."""

    def __init__(self, remote: Any) -> None:
        self._remote = remote
        self.whole = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def get(self, key: str) -> Any:
        found = self._remote.get(key)
        return found if self.whole else self

    @property
    def meta(self) -> dict[str, int]:
        return {"size": len(TEXT)}

    def stream(self) -> Iterator[bytes]:
        yield TEXT[:100]
        raise obstore.exceptions.GenericError("http://bucket.internal is gone")


def test_a_download_that_breaks_off_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = _Broken(obstore.store.MemoryStore())
    put(RemoteBlobs(remote, tmp_path / "one"), tmp_path / "w")
    blobs = RemoteBlobs(remote, tmp_path / "two")
    with pytest.raises(StoreUnavailable, match="object store failed \\(GenericError\\)") as raised:
        blobs.local_path(SHA)
    assert "bucket.internal" not in str(raised.value), "callers hear this"
    assert "bucket.internal" in caplog.text
    assert [path for path in (tmp_path / "two").rglob("*") if path.is_file()] == [
        tmp_path / "two/lock"
    ]
    remote.whole = True
    assert blobs.local_path(SHA).read_bytes() == TEXT


def test_which_store_a_url_means(tmp_path: Path) -> None:
    assert isinstance(open_blobs(str(tmp_path / "a")), LocalBlobs)
    assert isinstance(open_blobs(f"file://{tmp_path}/b"), LocalBlobs)
    spaced = tmp_path / "my blobs"
    open_blobs(spaced.as_uri())
    assert (spaced / "blobs").is_dir(), "a URL's %20 is a space on the disk"
    assert (tmp_path / "b/blobs").is_dir()
    assert isinstance(open_blobs("memory:///", tmp_path / "c"), RemoteBlobs)
    with pytest.raises(ValueError, match="wants a local cache"):
        open_blobs("s3://bucket")
