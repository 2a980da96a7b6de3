"""Bottleneck adapters after Houlsby et al. and Pfeiffer et al.: PEFT has none, so these are ours.

What they leave is AdapterHub's format. Its two files have the names that every adapter here has;
AdapterHub itself looks for the weights under `adapter.safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapters.activations import ACTIVATIONS
from adapters.checks.bottleneck import HOOKED, LOCATIONS, NATIVE
from base.load import Base
from training.config import Bottleneck, TrainConfig
from training.errors import MethodError
from training.methods.attached_model import AttachedModel
from training.methods.files import write_config, write_weights
from training.methods.method import Method
from training.methods.targets import put

NAME = "nibble"  # of the adapter within its file
FORMAT = "adapters.1.3.0"  # whose files these are like
NORMS = {"attention_adapters": "input_layernorm", "output_adapters": "post_attention_layernorm"}
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True, slots=True)
class Variant:
    """What tells the papers apart, in AdapterHub's words."""

    locations: tuple[str, ...]
    activation: str
    reads_stream: bool  # its original_ln_before


VARIANTS: Mapping[str, Variant] = {
    "houlsby": Variant(("attention_adapters", "output_adapters"), "swish", False),
    "pfeiffer": Variant(("output_adapters",), "relu", True),
}


class BottleneckAfter(nn.Module):
    """y' = y + U φ(D z + c) + u with z = y, or z = y + r: after a layer whose output y joins the
    residual stream r. "Parameter-Efficient Transfer Learning", arXiv:1902.00751, figure 2;
    "AdapterFusion", arXiv:2005.00247, section 3.2.

    D [width, hidden] and U [hidden, width] are fp32. U and u start at zero: the first output is
    the layer's own.
    """

    def __init__(self, layer: Any, norm: nn.Module | None, width: int, phi: str) -> None:
        super().__init__()
        self.layer = layer
        self.phi: Callable[[Tensor], Tensor] = ACTIVATIONS[phi]
        hidden, device = int(layer.out_features), layer.weight.device
        self.down = nn.Linear(hidden, width, device=device)
        self.up = nn.Linear(width, hidden, device=device)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)
        self._stream: Tensor | None = None
        self.hook: RemovableHandle | None = None
        if norm is not None:
            self.hook = norm.register_forward_pre_hook(self._keep)

    def _keep(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._stream = inputs[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        z = y.to(self.down.weight.dtype)
        if self._stream is not None:
            z, self._stream = z + self._stream, None
        own: Tensor = self.up(self.phi(self.down(z)))
        return y + own.to(y.dtype)


class BottleneckAdapter(AttachedModel):
    """A bottleneck in each block of the base: behind its feed-forward part, and with Houlsby's
    behind its attention too."""

    def __init__(self, base: Base, config: Bottleneck) -> None:
        if base.spec.architecture not in (*NATIVE, *HOOKED):
            raise MethodError(
                f"bottlenecks stand in blocks of {', '.join((*NATIVE, *HOOKED))}, and "
                f"{base.spec.id} is a {base.spec.architecture}"
            )
        self.base, self.config = base, config
        self.variant = VARIANTS[config.variant]
        width = max(1, int(base.spec.hidden_size // config.reduction))
        phi = config.activation or self.variant.activation
        if phi not in ACTIVATIONS:
            raise MethodError(
                f"method.activation {phi!r}: one of {', '.join(sorted(ACTIVATIONS))} is needed"
            )
        self.places: dict[str, tuple[str, BottleneckAfter]] = {}  # start of its tensors' names
        for block in range(base.spec.num_layers):
            for location in self.variant.locations:
                path = f"model.layers.{block}.{LOCATIONS[location]}"
                norm = base.norm(f"model.layers.{block}.{NORMS[location]}")
                stream = norm if self.variant.reads_stream else None
                layer = BottleneckAfter(base.linear(path), stream, width, phi)
                put(base.model, path, layer)
                start = f"model.layers.{block}.{location}.adapters.{NAME}."
                self.places[start] = (path, layer)

    def parameters(self) -> list[nn.Parameter]:
        return [layer.get_parameter(part) for _, layer in self.places.values() for part in PARTS]

    def save(self, out: Path) -> None:
        write_config(out, self.fields())
        write_weights(out, self.base, self.tensors())

    def fields(self) -> dict[str, Any]:
        """AdapterHub's adapter_config.json."""
        config, variant, spec = self.config, self.variant, self.base.spec
        return {
            "name": NAME,
            "version": FORMAT,
            "model_type": spec.architecture,
            "model_class": type(self.base.model).__name__,
            "model_name": spec.id,
            "hidden_size": spec.hidden_size,
            "config": {
                "mh_adapter": "attention_adapters" in variant.locations,
                "output_adapter": "output_adapters" in variant.locations,
                "reduction_factor": config.reduction,
                "non_linearity": config.activation or variant.activation,
                "original_ln_before": variant.reads_stream,
                "original_ln_after": True,
                "residual_before_ln": True,
                "adapter_residual_before_ln": False,
                "ln_before": False,
                "ln_after": False,
                "init_weights": "mam_adapter",
                "is_parallel": False,
                "scaling": 1.0,
                "use_gating": False,
                "leave_out": [],
                "dropout": 0.0,
                "phm_layer": False,
                "cross_adapter": False,
                "inv_adapter": None,
                "inv_adapter_reduction_factor": None,
            },
        }

    def tensors(self) -> dict[str, Tensor]:
        """Name in the file -> parameter."""
        down, up = "adapter_down.0", "adapter_up"
        ends = (f"{down}.weight", f"{down}.bias", f"{up}.weight", f"{up}.bias")
        return {
            start + end: layer.get_parameter(part)
            for start, (_, layer) in self.places.items()
            for end, part in zip(ends, PARTS, strict=True)
        }

    def detach(self) -> None:
        for path, layer in self.places.values():
            if layer.hook is not None:
                layer.hook.remove()
            put(self.base.model, path, layer.layer)


def variant_of(fields: Mapping[str, Any]) -> Bottleneck | None:
    """The method behind an AdapterHub config, where it is one of ours and no more than that."""
    own = fields["config"]
    for name, variant in VARIANTS.items():
        try:
            config = Bottleneck(
                kind="bottleneck",
                variant=name,  # type: ignore[arg-type]
                reduction=own["reduction_factor"],
                activation=own["non_linearity"],
            )
        except (KeyError, ValueError):
            return None
        said = {
            "mh_adapter": "attention_adapters" in variant.locations,
            "output_adapter": "output_adapters" in variant.locations,
            "original_ln_before": variant.reads_stream,
        }
        usual = {"is_parallel": False, "scaling": 1.0, "ln_before": False, "ln_after": False}
        usual |= {"original_ln_after": True, "residual_before_ln": True, "use_gating": False}
        wanted = said | {key: value for key, value in usual.items() if key in own}
        if fields["name"] == NAME and all(own.get(key) == wanted[key] for key in wanted):
            return config
    return None


def _attach(base: Base, config: TrainConfig) -> BottleneckAdapter:
    assert isinstance(config.method, Bottleneck)
    return BottleneckAdapter(base, config.method)


BOTTLENECK = Method("bottleneck", _attach)
