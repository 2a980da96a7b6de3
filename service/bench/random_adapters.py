"""Random LoRA adapters for any base, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from base.spec import BaseSpec


def random_adapters(out: Path, spec: BaseSpec, count: int, rank: int) -> list[Path]:
    """`count` different directories under `out`, each a LoRA on every quantised linear layer."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in _targets(spec)}),
        "bias": "none",
        "inference_mode": True,
    }
    directories = [out / f"bench-{number}" for number in range(count)]
    for number, directory in enumerate(directories):
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            _tensors(spec, rank, torch.Generator().manual_seed(number)),
            directory / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
    return directories


def _tensors(spec: BaseSpec, rank: int, chance: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in _targets(spec):
        shape = spec.linears[path]
        A = torch.randn(rank, shape.in_features, generator=chance) * shape.in_features**-0.5
        B = torch.randn(shape.out_features, rank, generator=chance) * 0.01
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    return tensors


def _targets(spec: BaseSpec) -> list[str]:
    return [path for path, shape in spec.linears.items() if shape.quantized]
