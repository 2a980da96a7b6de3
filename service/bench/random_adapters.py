"""Random adapters for any base, in PEFT's format: LoRAs, and an assortment of kinds and ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from base.spec import BaseSpec, LinearShape

ATTENTION = ("q_proj", "v_proj")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Sort:
    """One sort of adapter: a kind of KINDS, its rank, and the layers it is on (None: all)."""

    kind: str
    rank: int
    modules: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """The config's fields for a rank, and the tensors of one layer by the end of their names."""

    config: Callable[[int], Mapping[str, Any]]
    tensors: Callable[[LinearShape, int, Generator], Tensors]


def _normal(chance: Generator, strength: float, *size: int) -> Tensor:
    return torch.randn(size, generator=chance) * strength


def _lora(shape: LinearShape, rank: int, chance: Generator) -> Tensors:
    return {
        "lora_A.weight": _normal(chance, shape.in_features**-0.5, rank, shape.in_features),
        "lora_B.weight": _normal(chance, 0.01, shape.out_features, rank),
    }


def _dora(shape: LinearShape, rank: int, chance: Generator) -> Tensors:
    magnitude = 0.02 * shape.in_features**0.5  # of a row of weights that deviate by 0.02
    return _lora(shape, rank, chance) | {
        "lora_magnitude_vector": magnitude * (1 + _normal(chance, 0.01, shape.out_features))
    }


def _loha(shape: LinearShape, rank: int, chance: Generator) -> Tensors:
    return {
        f"hada_w{number}_{end}": _normal(chance, 0.05, *size)
        for number in (1, 2)
        for end, size in (("a", (shape.out_features, rank)), ("b", (rank, shape.in_features)))
    }


def _ia3(shape: LinearShape, rank: int, chance: Generator) -> Tensors:
    return {"ia3_l": 1 + _normal(chance, 0.01, shape.out_features, 1)}


def _of_lora(**more: Any) -> Callable[[int], Mapping[str, Any]]:
    fixed = {"peft_type": "LORA", "bias": "none", **more}
    return lambda rank: {**fixed, "r": rank, "lora_alpha": 2 * rank}


KINDS = {
    "lora": Kind(_of_lora(), _lora),
    "rslora": Kind(_of_lora(use_rslora=True), _lora),
    "dora": Kind(_of_lora(use_dora=True), _dora),
    "loha": Kind(lambda rank: {"peft_type": "LOHA", "r": rank, "alpha": rank}, _loha),
    "ia3": Kind(lambda rank: {"peft_type": "IA3", "feedforward_modules": []}, _ia3),
}
_MIXED = (
    *(Sort("lora", rank) for rank in (4, 8, 32)),
    *(Sort("rslora", rank) for rank in (4, 8, 16, 32)),
    *(Sort("dora", rank) for rank in (4, 8, 32)),
    *(Sort("lora", 64, ATTENTION), Sort("rslora", 64, ATTENTION)),
    *(Sort("loha", 2), Sort("loha", 4), Sort("ia3", 1), Sort("ia3", 1)),
)


def assortment(rank: int) -> tuple[Sort, ...]:
    """Thirty-two sorts: 8 LoRAs and 8 DoRAs of this rank on all layers, and 16 of mixed kinds."""
    return (*(Sort("lora", rank),) * 8, *(Sort("dora", rank),) * 8, *_MIXED)


def random_adapters(out: Path, spec: BaseSpec, count: int, rank: int) -> list[Path]:
    """`count` directories under `out`: the first so many of the assortment, all different."""
    known = {_last(path) for path in _targets(spec)}
    made = []
    for number, sort in enumerate(assortment(rank)[:count]):
        modules = sort.modules if known.issuperset(sort.modules or ()) else None
        chance = torch.Generator().manual_seed(number)
        made.append(
            random_adapter(out / f"bench-{number}", spec, sort.rank, chance, modules, sort.kind)
        )
    return made


def random_adapter(
    directory: Path,
    spec: BaseSpec,
    rank: int,
    chance: Generator,
    modules: Container[str] | None = None,
    kind: str = "lora",
) -> Path:
    """An adapter in `directory` on the quantised layers of these last names; None: on all."""
    targets = [path for path in _targets(spec) if modules is None or _last(path) in modules]
    if not targets:
        known = sorted({_last(path) for path in _targets(spec)})
        raise ValueError(f"no linear layer of this base is among {modules}; it has {known}")
    config = {
        "task_type": "CAUSAL_LM",
        "target_modules": sorted({_last(path) for path in targets}),
        "inference_mode": True,
        **KINDS[kind].config(rank),
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{path}.{end}": tensor
        for path in targets
        for end, tensor in KINDS[kind].tensors(spec.linears[path], rank, chance).items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def _targets(spec: BaseSpec) -> list[str]:
    return [path for path, shape in spec.linears.items() if shape.quantized]


def _last(path: str) -> str:
    return path.rpartition(".")[2]
