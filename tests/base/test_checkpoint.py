"""Which files of a directory are read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from base.checkpoint import INDEX, WEIGHTS, Checkpoint, read_json, weight_files
from base.errors import UnservableBase


def index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def shard(directory: Path, name: str, *keys: str) -> Path:
    save_file({key: torch.full((2,), float(i)) for i, key in enumerate(keys)}, directory / name)
    return directory / name


def test_one_file(tmp_path: Path) -> None:
    file = shard(tmp_path, WEIGHTS, "a", "b")
    shard(tmp_path, "consolidated.safetensors", "c")  # a second copy in another layout
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.files == (file,)
    assert set(checkpoint) == {"a", "b"}
    assert torch.equal(checkpoint.read("b"), torch.ones(2))


def test_shards_by_the_index(tmp_path: Path) -> None:
    files = (shard(tmp_path, "x-1.safetensors", "a"), shard(tmp_path, "x-2.safetensors", "b", "c"))
    index(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.files == files
    assert set(checkpoint) == {"a", "b", "c"}  # the shards decide, so nothing can hide
    assert torch.equal(checkpoint.read("c"), torch.ones(2))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, "x-1.safetensors", "a")
    shard(tmp_path, "x-2.safetensors", "a")
    index(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    with pytest.raises(UnservableBase, match=r"tensor a is in x-1\.safetensors and again in x-2"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    index(tmp_path, {"a": "x-1.safetensors"})
    with pytest.raises(UnservableBase, match=r"has no x-1\.safetensors$"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnservableBase, match=f"only {name}: only safetensors are read"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "s/a.safetensors", "a.bin", "..", "", 7]
)
def test_an_index_names_files_beside_it(name: Any, tmp_path: Path) -> None:
    index(tmp_path, {"a": name})
    with pytest.raises(UnservableBase, match=r"beside the index|only safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UnservableBase, match="has no readable weight_map"):
        weight_files(tmp_path)


def test_a_file_that_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"\x80\x04not a header")
    with pytest.raises(UnservableBase, match=r"model\.safetensors is not a readable safetensors"):
        Checkpoint(tmp_path)


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert read_json(file) == {}
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    file.write_text("{")
    with pytest.raises(UnservableBase, match=r"config\.json is not valid JSON"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(UnservableBase, match=r"config\.json must hold a JSON object"):
        read_json(file)
