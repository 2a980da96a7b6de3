"""LoRA, rsLoRA and DoRA on layers of our own, and how PEFT calls what they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from base.load import Base
from training.config import MethodConfig, TrainConfig
from training.layers import DoraLinear, LoraLinear
from training.methods.attached_model import AttachedModel
from training.methods.files import fill, write_config, write_weights
from training.methods.method import Method
from training.methods.targets import last_part, put, targets

Layers = Mapping[str, LoraLinear]  # module path -> the layer that stands there
PREFIX = "base_model.model."  # what PEFT's own wrapping puts before a module's path


@dataclass(frozen=True, slots=True)
class Kind:
    """`layer` stands in a target's place; `scale` is s of its equation.

    `tensors` maps the end of each tensor's name in PEFT's checkpoint to the layer's parameter.
    """

    layer: type[LoraLinear]
    scale: Callable[[MethodConfig], float]
    tensors: Mapping[str, str]
    peft_fields: Mapping[str, Any]


_FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B"}

KINDS: Mapping[str, Kind] = {
    "lora": Kind(LoraLinear, lambda config: config.alpha / config.rank, _FACTORS, {}),
    "rslora": Kind(  # "A Rank Stabilization Scaling Factor for Fine-Tuning", arXiv:2312.03732
        LoraLinear,
        lambda config: config.alpha / math.sqrt(config.rank),
        _FACTORS,
        {"use_rslora": True},
    ),
    "dora": Kind(
        DoraLinear,
        lambda config: config.alpha / config.rank,
        {**_FACTORS, "lora_magnitude_vector": "m"},
        {"use_dora": True},
    ),
}


class LowRankAdapter(AttachedModel):
    """Layers of ours in the places that `config.targets` names."""

    def __init__(self, base: Base, config: MethodConfig) -> None:
        self.base, self.config = base, config
        kind = KINDS[config.kind]
        self.layers: dict[str, LoraLinear] = {}
        for path, linear in targets(base, config.targets).items():
            layer = kind.layer(linear, config.rank, kind.scale(config), config.dropout, config.init)
            put(base.model, path, layer)
            self.layers[path] = layer

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]

    def groups(self, b_rate_ratio: float) -> list[dict[str, Any]]:
        fast = [layer.B for layer in self.layers.values()]
        held = {id(p) for p in fast}
        slow = [p for p in self.parameters() if id(p) not in held]
        return [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": b_rate_ratio}]

    def train(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.train(on)

    def save(self, out: Path) -> None:
        """An adapter that did not start at zero is saved as one of twice its rank."""
        write_config(out, self.fields())
        write_weights(out, self.base, self.tensors())

    def fields(self) -> dict[str, Any]:
        """PEFT's adapter_config.json; what it does not say is PEFT's default."""
        config = self.config
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base.spec.id,
            "inference_mode": True,
            "r": self._saved_rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": sorted({last_part(path) for path in self.layers}),
            "modules_to_save": None,
            **{name: False for kind in KINDS.values() for name in kind.peft_fields},
            **KINDS[config.kind].peft_fields,
        }

    @property
    def _saved_rank(self) -> int:
        return self.config.rank * (1 if self.config.init == "zero" else 2)

    def tensors(self) -> dict[str, Tensor]:
        """Name in the checkpoint -> tensor: the parameter itself where it is saved as it is."""
        kind, config = KINDS[self.config.kind], self.config
        # Another rank is another scale under the same alpha: B makes up for it.
        factor = kind.scale(config) / kind.scale(
            config.model_copy(update={"rank": self._saved_rank})
        )
        return {
            f"{PREFIX}{path}.{end}": layer.saved(attribute, factor)
            for path, layer in self.layers.items()
            for end, attribute in kind.tensors.items()
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Take the tensors of a checkpoint; the name of the first that does not fit, if any."""
        return fill(self.tensors(), tensors)

    def detach(self) -> None:
        for path, layer in self.layers.items():
            put(self.base.model, path, layer.base)


def _attach(base: Base, config: TrainConfig) -> LowRankAdapter:
    assert isinstance(config.method, MethodConfig)
    return LowRankAdapter(base, config.method)


LOW_RANK = tuple(Method(name, _attach) for name in KINDS)
