"""The activation functions that are served, by the names that transformers gives them."""

from __future__ import annotations

from typing import Any

from adapters.errors import InvalidAdapter

ACTIVATION_NAMES = (
    "gelu",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "hardswish",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)


def activation(name: str, value: Any) -> None:
    """A rule for a field that names one."""
    if value not in ACTIVATION_NAMES:
        raise InvalidAdapter(
            f"{str(value)[:80]!r}, expected one of {', '.join(ACTIVATION_NAMES)}", name
        )
