"""A trained adapter on disk, in PEFT's format: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

from base.load import Base
from training.attach import Layers, attach, detach, last_part
from training.config import MethodConfig
from training.errors import MethodError
from training.methods import METHODS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT's own wrapping puts before a module's path


def save(out: Path, base: Base, layers: Layers, config: MethodConfig) -> None:
    """Write the adapter to the directory `out`, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=sorted({last_part(path) for path in layers}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.spec.id,
        inference_mode=True,
        **METHODS[config.kind].peft_fields,
    ).save_pretrained(str(out))
    _write_sorted(out / CONFIG)
    save_file(
        _tensors(layers, config),
        out / WEIGHTS,
        metadata={"format": "pt", "base_fingerprint": base.spec.fingerprint},
    )
    (out / WEIGHTS).chmod(0o644)  # safetensors makes it private, which no other file here is


def load(source: Path, base: Base) -> Layers:
    """Attach the adapter of the directory `source`, as `save` wrote it, to the base.

    Raises MethodError when its tensors do not fit the base.
    """
    config = method_config(source)
    tensors = load_file(source / WEIGHTS)
    layers = attach(base, config)
    expected = _tensors(layers, config)
    unlike = sorted(
        name
        for name in tensors.keys() | expected.keys()
        if name not in tensors
        or name not in expected
        or tensors[name].shape != expected[name].shape
    )
    if unlike:
        detach(base, layers)
        raise MethodError(f"{source / WEIGHTS}: {unlike[0]} does not fit {base.spec.id}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    return layers


def method_config(source: Path) -> MethodConfig:
    """The method that made the adapter of the directory `source`."""
    path = source / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MethodError(f"{path}: {error}") from None
    flags = {name: method.peft_fields for name, method in METHODS.items()}
    used = {field: fields.get(field, False) for row in flags.values() for field in row}
    for name, row in flags.items():
        if used == {**dict.fromkeys(used, False), **row}:
            return MethodConfig(
                kind=name,  # type: ignore[arg-type]
                rank=fields["r"],
                alpha=fields["lora_alpha"],
                dropout=fields["lora_dropout"],
                targets=tuple(fields["target_modules"]),
            )
    raise MethodError(f"{path}: {used} is no method that is trained here")


def _tensors(layers: Layers, config: MethodConfig) -> dict[str, torch.Tensor]:
    """Name in the checkpoint -> the parameter itself (its memory, not a copy)."""
    names = METHODS[config.kind].tensors
    return {
        f"{PREFIX}{path}.{end}": getattr(layer, attribute).detach()
        for path, layer in layers.items()
        for end, attribute in names.items()
    }


def _write_sorted(path: Path) -> None:
    """PEFT writes sets in the order of the day; the same run should leave the same bytes."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["target_modules"].sort()
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
