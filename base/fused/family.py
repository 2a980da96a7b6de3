"""The classes of transformers that are known here, and how they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from base.kernels.steps import GELU_TANH, SILU


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family of decoders apart from Llama."""

    name: str  # as the classes begin: <name>ForCausalLM, <name>DecoderLayer, ...
    shift: float = 0.0  # of a norm's weight: Gemma multiplies by 1 + weight
    sandwich: bool = False  # a second norm after attention and after the MLP
    softcap: str | None = None  # field of the attention that caps its scores
    rotary_by_type: bool = False  # other angles for each type of layer

    def is_layer(self, module: nn.Module) -> bool:
        return kind_of(module) == f"{self.name}DecoderLayer"

    def is_norm(self, module: nn.Module) -> bool:
        return kind_of(module) == f"{self.name}RMSNorm"


def kind_of(module: nn.Module) -> str:
    """The class of transformers that a module is, or stands for (`base.lean`)."""
    return str(getattr(module, "kind", type(module).__name__))


_FAMILIES = (
    Family("Llama"),
    Family("Mistral"),
    Family("Qwen2"),
    Family("Qwen3"),
    Family("Gemma", shift=1.0),
    Family("Gemma2", shift=1.0, sandwich=True, softcap="attn_logit_softcapping"),
    Family("Gemma3", shift=1.0, sandwich=True, rotary_by_type=True),
)
_GATES = {
    "silu": SILU,
    "swish": SILU,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
}


def family_of(model: Any) -> Family | None:
    """The family of a causal LM of transformers or of `base.lean`; None where it is not known."""
    if not type(model).__module__.startswith(("transformers.models.", "base.lean.")):
        return None
    for family in _FAMILIES:
        if kind_of(model) == f"{family.name}ForCausalLM":
            return family
    return None


def gate_of(config: Any) -> int | None:
    """What the MLP does to its gate, as the kernels number it."""
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return _GATES.get(name) if isinstance(name, str) else None
