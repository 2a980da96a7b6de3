"""A trained adapter's two files, in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import peft
from safetensors.torch import save_file
from torch import Tensor

from base.load import Base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def write(out: Path, base: Base, config: peft.PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config and weights to the directory `out`, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    _write_sorted(out / CONFIG)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        out / WEIGHTS,
        metadata={"format": "pt", "base_fingerprint": base.spec.fingerprint},
    )
    _sort_metadata(out / WEIGHTS)
    (out / WEIGHTS).chmod(0o644)  # safetensors makes it private, which no other file here is


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


def _write_sorted(path: Path) -> None:
    """PEFT writes sets in the order of the day; the same run should leave the same bytes."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(fields.get(name), list):
            fields[name].sort()
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
