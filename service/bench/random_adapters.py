"""Random LoRA adapters for any base, in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import torch
from safetensors.torch import save_file

from base.spec import BaseSpec


def random_adapters(out: Path, spec: BaseSpec, count: int, rank: int) -> list[Path]:
    """`count` different directories under `out`, each a LoRA on every quantised linear layer."""
    return [
        random_adapter(out / f"bench-{number}", spec, rank, torch.Generator().manual_seed(number))
        for number in range(count)
    ]


def random_adapter(
    directory: Path,
    spec: BaseSpec,
    rank: int,
    chance: torch.Generator,
    modules: Container[str] | None = None,
) -> Path:
    """A LoRA in `directory` on the quantised linear layers of these last names; None: on all."""
    targets = [path for path in _targets(spec) if modules is None or _last(path) in modules]
    if not targets:
        known = sorted({_last(path) for path in _targets(spec)})
        raise ValueError(f"no linear layer of this base is among {modules}; it has {known}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({_last(path) for path in targets}),
        "bias": "none",
        "inference_mode": True,
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        _tensors(spec, targets, rank, chance),
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


def _tensors(
    spec: BaseSpec, targets: list[str], rank: int, chance: torch.Generator
) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in targets:
        shape = spec.linears[path]
        A = torch.randn(rank, shape.in_features, generator=chance) * shape.in_features**-0.5
        B = torch.randn(shape.out_features, rank, generator=chance) * 0.01
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    return tensors


def _targets(spec: BaseSpec) -> list[str]:
    return [path for path, shape in spec.linears.items() if shape.quantized]


def _last(path: str) -> str:
    return path.rpartition(".")[2]
