"""A trained adapter's two files, named and laid out as PEFT does it."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters import evaluation
from base.load import Base
from training.tree import replacing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def write_config(out: Path, fields: dict[str, Any]) -> None:
    """PEFT writes sets in the order of the day; the same run should leave the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(fields.get(name), list):
            fields[name].sort()
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (out / CONFIG).write_text(text, encoding="utf-8")


def write_weights(out: Path, base: Base, tensors: Mapping[str, Tensor]) -> None:
    """The tensors, and which base they are for, in the directory `out`: whole or not at all."""
    with replacing(out / WEIGHTS) as written:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            written,
            metadata={"format": "pt", "base_fingerprint": base.spec.fingerprint},
        )
        _sort_metadata(written)
        _forget_other_figures(out, written)
        written.chmod(0o644)  # safetensors makes it private, which no other file here is


@torch.no_grad()
def fill(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """Copy a checkpoint into the tensors that it is for; the first name that does not fit, if any,
    and then nothing was copied."""
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors or name not in expected:
            return name
        if tensors[name].shape != expected[name].shape:
            return name
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
    return None


def _forget_other_figures(out: Path, written: Path) -> None:
    """An evaluation that lies in `out` is of the weights there: it may not speak for others."""
    there = out / WEIGHTS
    if not there.is_file() or not filecmp.cmp(there, written, shallow=False):
        (out / evaluation.FILE).unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """safetensors writes its metadata in the order of the day; the same run should leave the same
    bytes. The header keeps its length: it is padded with blanks, as the format allows."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= length, "names in a header are plain ASCII"
        file.seek(8)
        file.write(text.ljust(length))
