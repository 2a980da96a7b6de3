"""The file under a kept base: what it keeps, what it refuses, and how writers meet."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from base.mapped_file import DamagedFile, read, write

TENSORS = {
    "a": torch.arange(7, dtype=torch.uint8),
    "b": torch.randn(3, 5),
    "nothing": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    "c": torch.randn(4, 3).to(torch.bfloat16).T,  # not contiguous
    "flags": torch.tensor([True, False]),
    "positions": torch.arange(5),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "tensors.safetensors"


def test_what_is_written_is_read(file: Path) -> None:
    write(file, TENSORS, {"note": "text"})
    mapped = read(file)
    assert mapped.notes == {"note": "text"}
    assert list(mapped.tensors) == list(TENSORS)
    for name, tensor in mapped.tensors.items():
        assert tensor.dtype is TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


def test_it_is_a_safetensors_file(file: Path) -> None:
    write(file, TENSORS, {})
    theirs = load_file(file)
    for name, tensor in TENSORS.items():
        assert torch.equal(theirs[name], tensor)


def test_what_is_written_to_a_tensor_stays_in_the_process(file: Path) -> None:
    write(file, TENSORS, {})
    read(file).tensors["b"].zero_()
    assert torch.equal(read(file).tensors["b"], TENSORS["b"])


def test_the_same_tensors_give_the_same_bytes_but_for_the_time(file: Path) -> None:
    write(file, TENSORS, {})
    first = file.read_bytes()
    write(file, TENSORS, {})
    assert len(file.read_bytes()) == len(first)
    assert file.read_bytes()[-400:] == first[-400:]


def test_a_dtype_that_is_not_kept_leaves_nothing_behind(file: Path) -> None:
    with pytest.raises(ValueError, match=r"x is torch\.complex64, which is not kept"):
        write(file, {"x": torch.zeros(2, dtype=torch.complex64)}, {})
    assert list(file.parent.iterdir()) == []


def test_every_cut_and_every_changed_byte_is_found(file: Path) -> None:
    write(file, {"a": torch.arange(70, dtype=torch.uint8)}, {"note": "text"})
    good = file.read_bytes()
    written = file.stat().st_mtime_ns
    for end in range(0, len(good), 7):
        file.write_bytes(good[:end])
        with pytest.raises(DamagedFile):
            read(file)
    blank = good.rstrip(b"\0").rfind(b"}") + 1  # spaces after the header mean nothing
    for place in (*range(0, blank, 5), *range(len(good) - 128, len(good))):
        file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(DamagedFile):
            read(file)
    file.write_bytes(good)
    assert read(file).notes == {"note": "text"}
    assert file.stat().st_mtime_ns == written


def test_writers_and_readers_at_once(file: Path) -> None:
    """A reader sees one whole file, and a mapping outlives the file that it was made of."""
    contents = [torch.full((1 << 16,), value, dtype=torch.uint8) for value in range(4)]
    write(file, {"x": contents[0]}, {})
    earlier = read(file).tensors["x"]

    def rewrite(content: torch.Tensor) -> None:
        for _ in range(5):
            write(file, {"x": content}, {})

    writers = [threading.Thread(target=rewrite, args=(content,)) for content in contents[1:]]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert read(file).tensors["x"].unique().numel() == 1
    for writer in writers:
        writer.join()
    assert not earlier.any()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_a_crash_left_is_swept(file: Path) -> None:
    file.parent.mkdir()
    old, new = file.parent / "x.tmp", file.parent / "y.tmp"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    write(file, TENSORS, {})
    assert not old.exists()
    assert new.exists()
