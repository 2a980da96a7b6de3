"""The fingerprint tells bases apart by what they are, and reads a big file once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from base.fingerprint import default_cache_dir, fingerprint, fingerprints

CONFIG = {"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, text) for name, text in (("a", "one"), ("b", "two"))]


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def of(files: list[Path], cache_dir: Path, config: Any = CONFIG, double_quant: bool = False) -> str:
    return fingerprint(config, files, double_quant=double_quant, cache_dir=cache_dir)


def test_same_content_elsewhere_is_the_same_base(files: list[Path], tmp_path: Path) -> None:
    moved = [write(tmp_path / "there" / "y", "two"), write(tmp_path / "there" / "x", "one")]
    assert of(files, tmp_path / "c1") == of(moved, tmp_path / "c2")
    assert len(of(files, tmp_path / "c1")) == 64


def test_what_a_base_is_changes_it(files: list[Path], tmp_path: Path) -> None:
    seen = {of(files, tmp_path)}
    seen.add(of(files, tmp_path, {**CONFIG, "hidden_size": 128}))
    seen.add(of(files, tmp_path, {**CONFIG, "rope_parameters": {"rope_theta": 1e6}}))
    seen.add(of(files, tmp_path, double_quant=True))
    assert set(fingerprints(CONFIG, files, tmp_path).values()) < seen
    seen.add(of(files[:1], tmp_path))
    seen.add(of([files[0], write(tmp_path / "d", "TWO")], tmp_path))
    assert len(seen) == 6


def test_notes_of_the_writer_do_not(files: list[Path], tmp_path: Path) -> None:
    noted = {**CONFIG, "transformers_version": "9", "_name_or_path": "/x", "dtype": "bfloat16"}
    assert of(files, tmp_path, noted) == of(files, tmp_path)


def test_an_unchanged_file_is_read_once(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = hashlib.file_digest

    def watched(file: Any, algorithm: str) -> Any:
        read.append(Path(file.name).name)
        return plain(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", watched)
    cache = tmp_path / "cache"
    first = of(files, cache)
    assert read == ["a", "b"]
    assert of(files, cache) == first
    assert read == ["a", "b"]
    stat = files[1].stat()
    files[1].write_text("TWO")  # the same size, a later time
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert of(files, cache) != first
    assert read == ["a", "b", "b"]


def test_a_link_and_its_target_are_one_file(files: list[Path], tmp_path: Path) -> None:
    """The hub's snapshots are links to blobs."""
    link = tmp_path / "link"
    link.symlink_to(files[0])
    of([files[0]], tmp_path / "cache")
    of([link], tmp_path / "cache")
    assert len(json.loads((tmp_path / "cache" / "weights.json").read_text())) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"%s": 7}'])
def test_a_spoiled_cache_is_ignored(content: str, files: list[Path], tmp_path: Path) -> None:
    expected = of(files, tmp_path / "c1")
    write(tmp_path / "c2" / "weights.json", content.replace("%s", str(files[0])))
    assert of(files, tmp_path / "c2") == expected


def test_a_cache_that_cannot_be_written_is_no_error(files: list[Path], tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    assert of(files, tmp_path / "file") == of(files, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIBBLE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("NIBBLE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert default_cache_dir() == tmp_path / "caches" / "nibble"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "nibble"
