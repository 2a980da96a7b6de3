"""Bottleneck adapters in plain torch, one at a time: the oracle, and a maker of files.

PEFT has none, and the library that has them takes our own name. So the blocks of transformers'
model are run as they are written, with the bottleneck where Houlsby et al. (2019, figure 2),
Pfeiffer et al. (2020, section 3.2) and He et al. (2021, table 1) put it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN

from tests.oracle import PeftOracle

# What AdapterHub's three configs differ in (`DoubleSeqBnConfig`, `SeqBnConfig`, `ParBnConfig`).
HOULSBY = {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish"}
PFEIFFER = {
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "original_ln_before": True,
}
PARALLEL = {
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "is_parallel": True,
    "scaling": 4.0,
    "reduction_factor": 2,
}
FIELDS: dict[str, Any] = {
    "reduction_factor": 16,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "init_weights": "bert",
    "init_weights_seed": None,
    "stochastic_depth": 0.0,
}


def make_bottleneck(
    directory: Path,
    base: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    zero: bool = False,
    root: str = "model.",
    name: str = "mine",
) -> Path:
    """adapter_config.json and the weights, as AdapterHub saves them for the base in `base`."""
    directory.mkdir(parents=True)
    model = json.loads((base / "config.json").read_text())
    own = FIELDS | dict(config)
    about = {"name": name, "version": "adapters.1.3.0", "model_class": "LlamaForCausalLM"}
    about |= {"model_name": "tiny", "model_type": model["model_type"]}
    about |= {"hidden_size": model["hidden_size"], "config": own}
    (directory / "adapter_config.json").write_text(json.dumps(about))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(model["num_hidden_layers"]):
        for location, wanted in (("attention_adapters", "mh"), ("output_adapters", "output")):
            if layer in own["leave_out"] or not own[f"{wanted}_adapter"]:
                continue
            start = f"{root}layers.{layer}.{location}.adapters.{name}."
            made = _random(own, layer, model["hidden_size"], generator)
            if zero:
                made["adapter_up.weight"].zero_()
                made["adapter_up.bias"].zero_()
            tensors |= {start + leaf: tensor for leaf, tensor in made.items()}
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    return directory


def _random(
    own: Mapping[str, Any], layer: int, hidden: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    reduction = own["reduction_factor"]
    if isinstance(reduction, dict):
        reduction = reduction.get(str(layer), reduction.get("default"))
    width = max(1, int(hidden // reduction))
    shapes = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    if isinstance(own["scaling"], str):
        shapes["scaling"] = (1,) if own["scaling"] == "learned" else (hidden,)
    return {
        leaf: 0.3 * torch.randn(shape, generator=generator) + (leaf == "scaling")
        for leaf, shape in shapes.items()
    }


class BottleneckOracle:
    """The base in `base` with the adapter in `adapter`, over the same NF4 weights, in float32."""

    def __init__(self, base: Path, adapter: Path) -> None:
        saved = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(str(adapter / "adapter_model.safetensors"))
        self._oracle = PeftOracle(base)
        for number, block in enumerate(self._oracle.model.model.layers):
            places = {}
            for location in ("attention_adapters", "output_adapters"):
                start = f"layers.{number}.{location}.adapters.{saved['name']}."
                own = {n.partition(start)[2]: t for n, t in tensors.items() if start in n}
                places[location] = _Bottleneck(saved["config"], own) if own else _plain
            block.forward = _Block(block, **places)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return self._oracle.logits(tokens)


def _plain(y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return r + y


class _Block:
    """One block of a Llama, where a bottleneck may stand in the place of each `r + y`."""

    def __init__(self, block: Any, attention_adapters: Any, output_adapters: Any) -> None:
        self.block = block
        self.after_attention, self.after_mlp = attention_adapters, output_adapters

    def __call__(self, r: torch.Tensor, **arguments: Any) -> torch.Tensor:
        block = self.block
        y = block.self_attn(hidden_states=block.input_layernorm(r), **arguments)[0]
        r = self.after_attention(y, r)
        out: torch.Tensor = self.after_mlp(block.mlp(block.post_attention_layernorm(r)), r)
        return out


class _Bottleneck:
    """y of a layer and the stream r -> the next stream."""

    def __init__(self, config: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        width, hidden = own["adapter_down.0.weight"].shape
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        for linear, name in ((self.down, "adapter_down.0"), (self.up, "adapter_up")):
            linear.weight.data.copy_(own[f"{name}.weight"])
            linear.bias.data.copy_(own[f"{name}.bias"])
        name = config["non_linearity"].lower()
        self.activation = nn.functional.leaky_relu if name == "leakyrelu" else ACT2FN[name]
        self.scale = own.get("scaling", config["scaling"])

    def f(self, z: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.up(self.activation(self.down(z))) * self.scale
        return out

    def __call__(self, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        if self.config["is_parallel"]:
            out = self.f(r) + y
        else:
            residual = y
            if self.config["original_ln_before"]:
                y = y + r
            if not self.config["residual_before_ln"]:
                residual = y
            out = self.f(y) + residual
        return out + r if self.config["original_ln_after"] else out
