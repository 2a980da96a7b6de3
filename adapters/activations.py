"""The activation functions that adapters name, φ in the operator: transformers' own, by name.

Each works number by number, so a row stays a row. `adapters/checks/activation.py` has the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


_gelu_tanh: Activation = partial(functional.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
    "linear": _identity,
    "mish": functional.mish,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "relu2": _relu_squared,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
