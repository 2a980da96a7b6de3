"""The base on disk: mapped at the second load, the same bits, and never trusted blindly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import base.kept
import base.load
from base.dense import RoundedLinear
from base.kept import KeptBase, kept_bytes, kept_folder
from base.kernels import PanelWeight, fast_status
from base.load import Base, load_base
from base.nf4 import NF4Linear
from tests.base.tiny import CONFIGS, save_tiny

IDS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny(CONFIGS["qwen3"], tmp_path / "base", dtype=torch.bfloat16)
    return tmp_path / "base"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(directory: Path, cache: Path, **more: Any) -> Base:
    return load_base(directory, device="cpu", dtype="float32", cache_dir=cache, **more)


@torch.inference_mode()
def logits(base: Base) -> Tensor:
    return base.model(IDS).logits  # type: ignore[no-any-return]


def kept_file(cache: Path) -> Path:
    (file,) = kept_folder(cache).glob("*.safetensors")
    return file


def mapped(file: Path) -> int:
    """How many bytes of a file this process has mapped."""
    rows = [row.split() for row in Path("/proc/self/maps").read_text().splitlines()]
    ends = [row[0].split("-") for row in rows if len(row) > 5 and row[5] == str(file)]
    return sum(int(end, 16) - int(start, 16) for start, end in ends)


@pytest.fixture
def fillings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every load that quantised the checkpoint."""
    runs: list[int] = []
    plain = base.load.Filling.run

    def counted(filling: Any) -> None:
        runs.append(1)
        plain(filling)

    monkeypatch.setattr(base.load.Filling, "run", counted)
    return runs


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("llama", "exact"),
        ("gemma2", "exact"),
        ("gemma3", "exact"),
        ("llama", "fast"),
        ("gemma2", "fast"),
    ],
)
def test_the_second_load_gives_the_same_bits(
    name: str, precision: Any, tmp_path: Path, cache: Path, fillings: list[int]
) -> None:
    """Tied and untied heads, scaled embeddings, a table that stays in bfloat16."""
    save_tiny(CONFIGS[name], tmp_path / "b", dtype=torch.bfloat16)
    first = load(tmp_path / "b", cache, precision=precision)
    second = load(tmp_path / "b", cache, precision=precision)
    assert len(fillings) == 1
    assert torch.equal(logits(first), logits(second))
    assert second.spec == first.spec
    assert second.precision == first.precision
    tables = [one.model.get_input_embeddings() for one in (first, second)]
    assert type(tables[0]) is type(tables[1])
    heads = [one.model.get_output_embeddings() for one in (first, second)]
    assert type(heads[0]) is type(heads[1])
    if precision == "exact" or not first.spec.tied_embeddings:
        assert tables[0].weight.dtype is tables[1].weight.dtype is torch.bfloat16
    if first.precision == "fast":
        assert type(heads[1]) is RoundedLinear
        assert (heads[1].weight is tables[1].weight) == first.spec.tied_embeddings
    assert not any(p.requires_grad or p.is_meta for p in second.model.parameters())


def test_double_quantisation_and_the_plain_scales_are_kept_apart(
    directory: Path, cache: Path, fillings: list[int]
) -> None:
    nested = logits(load(directory, cache, double_quant=True))
    plain = logits(load(directory, cache, double_quant=False))
    assert len(fillings) == 2
    assert not torch.equal(nested, plain)
    assert torch.equal(nested, logits(load(directory, cache, double_quant=True)))
    assert len(fillings) == 2


def test_the_tensors_are_views_of_the_mapping(directory: Path, cache: Path) -> None:
    first = load(directory, cache)
    file = kept_file(cache)
    assert kept_bytes(cache) == file.stat().st_size
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    assert mapped(file) == 0
    second = load(directory, cache)
    # One mapping of the whole file; tensors in it are aligned as torch's own are.
    size = file.stat().st_size
    assert size <= mapped(file) < size + 4096
    low, high = next(
        (int(end, 16) for end in row.split()[0].split("-"))
        for row in Path("/proc/self/maps").read_text().splitlines()
        if row.endswith(str(file))
    )
    layer = second.linear("model.layers.1.mlp.up_proj")
    assert isinstance(layer, NF4Linear)
    for tensor in (*layer.weight.tensors().values(), *second.model.parameters()):
        assert low <= tensor.data_ptr() < high
        assert tensor.data_ptr() % 64 == 0
    assert torch.equal(logits(first), logits(second))


def test_panels_are_kept_as_they_are(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fast_status().startswith("exact"):
        pytest.skip("no C library")
    load(directory, cache, precision="fast")

    def repacked(weight: Any) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(PanelWeight, "pack", repacked)
    assert load(directory, cache, precision="fast").precision == "fast"


def truncated(content: bytes) -> bytes:
    return content[:-100]


def without_tensors(content: bytes) -> bytes:
    return content[:4]


def empty(content: bytes) -> bytes:
    return b""


def in_the_tensors(content: bytes) -> bytes:
    return content[:-5000] + bytes([content[-5000] ^ 1]) + content[-4999:]


def in_the_header(content: bytes) -> bytes:
    assert b'"F32"' in content
    return content.replace(b'"F32"', b'"I32"', 1)


@pytest.mark.parametrize(
    "alter", [truncated, without_tensors, empty, in_the_tensors, in_the_header]
)
def test_an_altered_file_is_made_anew(
    alter: Callable[[bytes], bytes],
    directory: Path,
    cache: Path,
    fillings: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = logits(load(directory, cache))
    file = kept_file(cache)
    good = file.read_bytes()
    file.write_bytes(alter(good))
    assert torch.equal(logits(load(directory, cache)), wanted)
    assert len(fillings) == 2
    assert "is not used and made anew" in caplog.text
    assert len(file.read_bytes()) == len(good)
    assert torch.equal(logits(load(directory, cache)), wanted)
    assert len(fillings) == 2


def test_a_copy_of_the_file_is_read_through_once_and_used(
    directory: Path, cache: Path, fillings: list[int]
) -> None:
    load(directory, cache)
    file = kept_file(cache)
    written = file.stat().st_mtime_ns
    os.utime(file, ns=(written + 1, written + 1))
    load(directory, cache)
    assert len(fillings) == 1
    assert file.stat().st_mtime_ns == written


def test_the_file_of_another_base_is_not_used(
    tmp_path: Path, directory: Path, cache: Path, fillings: list[int]
) -> None:
    """Not by its name, and not when somebody has given it this base's name."""
    load(directory, cache)
    theirs = kept_file(cache)
    save_tiny(CONFIGS["qwen3"], tmp_path / "other", seed=9, dtype=torch.bfloat16)
    wanted = logits(load(tmp_path / "other", cache))
    assert len(fillings) == 2
    (ours,) = set(kept_folder(cache).glob("*.safetensors")) - {theirs}
    ours.unlink()
    theirs.rename(ours)
    assert torch.equal(logits(load(tmp_path / "other", cache)), wanted)
    assert len(fillings) == 3


def test_changed_weights_are_another_base(
    directory: Path, cache: Path, fillings: list[int]
) -> None:
    before = logits(load(directory, cache))
    save_tiny(CONFIGS["qwen3"], directory, seed=5, dtype=torch.bfloat16)
    assert not torch.equal(logits(load(directory, cache)), before)
    assert len(fillings) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory would be")
    with caplog.at_level(logging.WARNING):
        first = load(directory, blocked)
    assert "is not kept for the next start" in caplog.text
    assert torch.equal(logits(first), logits(load(directory, blocked)))


def test_a_full_disk_is_left_alone(
    directory: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(base.kept, "_KEPT_FREE", 1 << 62)
    load(directory, cache)
    assert kept_bytes(cache) == 0
    assert "MiB are free" in caplog.text


def test_nothing_is_kept_when_that_is_not_wanted(
    directory: Path, cache: Path, fillings: list[int]
) -> None:
    load(directory, cache, keep=False)
    load(directory, cache, keep=False)
    assert len(fillings) == 2
    assert kept_bytes(cache) == 0


_LOADER = """
import sys, torch
from base.load import load_base
base = load_base(sys.argv[1], device="cpu", dtype="float32", cache_dir=sys.argv[2])
with torch.inference_mode():
    torch.save(base.model(torch.load(sys.argv[3])).logits, sys.argv[4])
"""


@pytest.mark.slow
def test_processes_that_load_at_once(directory: Path, cache: Path, tmp_path: Path) -> None:
    torch.save(IDS, tmp_path / "ids")
    command = [sys.executable, "-c", _LOADER, str(directory), str(cache), str(tmp_path / "ids")]
    running = [subprocess.Popen([*command, str(tmp_path / f"{i}")]) for i in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    wanted = logits(load(directory, cache, keep=False))
    for i in range(3):
        assert torch.equal(torch.load(tmp_path / f"{i}"), wanted)
    assert torch.equal(logits(load(directory, cache)), wanted)


def test_the_trial_run_is_left_out_once_this_code_passed_it(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    plain = base.load.probe_attention

    def counted(model: Any, device: torch.device) -> Any:
        runs.append(1)
        return plain(model, device)

    monkeypatch.setattr(base.load, "probe_attention", counted)
    spec = load(directory, cache).spec
    assert load(directory, cache).spec == spec
    assert len(runs) == 1
    assert load(directory, cache, always_probe=True).spec == spec
    assert len(runs) == 2
    monkeypatch.setattr(base.kept, "code_version", lambda: "another version")
    load(directory, cache)
    assert len(runs) == 3
    load(directory, cache)
    assert len(runs) == 3


def test_a_damaged_note_of_the_trial_run_is_not_believed(directory: Path, cache: Path) -> None:
    load(directory, cache)
    (note,) = kept_folder(cache).glob("*.json")
    good = json.loads(note.read_text())
    source = note.name.split("-")[0]
    kept = KeptBase(cache, source, torch.float32, "exact")
    assert kept.passed() is not None
    good["attention"]["num_heads"] = "4"
    for text in (json.dumps(good), "{", "[]", "{}", json.dumps({**good, "attention": {}})):
        note.write_text(text)
        assert kept.passed() is None
