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
    (out / WEIGHTS).chmod(0o644)  # safetensors makes it private, which no other file here is


def _write_sorted(path: Path) -> None:
    """PEFT writes sets in the order of the day; the same run should leave the same bytes."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(fields.get(name), list):
            fields[name].sort()
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
