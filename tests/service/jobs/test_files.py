"""Training files: durable by their row, swept without one, never named by a client."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from adapters.errors import StoreFull
from service.errors import NotFound
from service.jobs.files import TrainingFiles
from tests.service.jobs.conftest import keep


def test_a_file_comes_back(files: TrainingFiles, tmp_path: Path) -> None:
    kept = keep(files, tmp_path, b"abc")
    assert files.get(kept.id) == kept
    assert files.path(kept).read_bytes() == b"abc"
    assert not (tmp_path / "uploaded").exists()


def test_pages_in_both_orders(files: TrainingFiles, tmp_path: Path) -> None:
    ids = [keep(files, tmp_path).id for _ in range(4)]
    found, more = files.list(limit=2, order="desc")
    assert ([file.id for file in found], more) == ([ids[3], ids[2]], True)
    found, more = files.list(after=ids[1], limit=9, order="asc", purpose="fine-tune")
    assert ([file.id for file in found], more) == ([ids[2], ids[3]], False)
    assert files.list(limit=9, order="asc", purpose="other") == ([], False)


@pytest.mark.parametrize("wrong", ["", "x", "../catalog.db", "file-" + "0" * 24, "file-\0"])
def test_what_is_no_file_is_not_found(files: TrainingFiles, wrong: str) -> None:
    with pytest.raises(NotFound):
        files.get(wrong)


def test_a_deleted_file_is_gone(files: TrainingFiles, tmp_path: Path) -> None:
    kept = keep(files, tmp_path)
    path = files.path(kept)
    files.delete(kept.id)
    assert not path.exists()
    with pytest.raises(NotFound):
        files.delete(kept.id)


def test_a_crash_before_the_row_leaves_nothing(files: TrainingFiles, tmp_path: Path) -> None:
    kept = keep(files, tmp_path)
    orphan = tmp_path / "files" / ("file-" + "a" * 24)
    orphan.write_bytes(b"bytes without a row")
    assert files.sweep() == 1
    assert not orphan.exists()
    assert files.path(kept).exists()


def test_a_full_disk_is_told(
    files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StoreFull):
        keep(files, tmp_path)
    assert files.list(limit=9, order="asc") == ([], False)
