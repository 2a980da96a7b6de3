"""AdamW, plain and with its two moments in 8 bits or in memory that is paged out of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from training.config import OptimConfig
from training.errors import ConfigError
from training.methods.method import Attached


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
        import bitsandbytes  # dear to import, and few ask for it

        kind: Callable[..., torch.optim.Optimizer] = getattr(bitsandbytes.optim, name)
        return kind(groups, weight_decay=weight_decay)

    return make


@dataclass(frozen=True, slots=True)
class Row:
    """`devices`: where it works. `instead`: what would work elsewhere."""

    make: Callable[..., torch.optim.Optimizer]
    devices: tuple[str, ...] = ("cpu", "cuda")
    instead: str = ""


OPTIMIZERS: Mapping[str, Row] = {
    "adamw": Row(torch.optim.AdamW, ("cpu", "cuda", "mps", "xpu")),
    # "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861
    "adamw_8bit": Row(_bitsandbytes("AdamW8bit"), instead="adamw"),
    # "QLoRA", arXiv:2305.14314, section 3: CUDA's unified memory, which a CPU has no use for
    "paged_adamw": Row(_bitsandbytes("PagedAdamW"), ("cuda",), "adamw"),
    "paged_adamw_8bit": Row(_bitsandbytes("PagedAdamW8bit"), ("cuda",), "adamw_8bit"),
}


def optimizer(adapter: Attached, optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The run's optimiser over the adapter, with a rate of its own for each group.

    Raises ConfigError where the device has none such.
    """
    row = OPTIMIZERS[optim.kind]
    if device.type not in row.devices:
        raise ConfigError(
            f"optim.kind {optim.kind} works on {' and '.join(row.devices)}, and this base is on "
            f"{device.type}; {row.instead} is right",
            "optim.kind",
        )
    groups = [
        {"params": group["params"], "lr": optim.learning_rate * group["ratio"]}
        for group in adapter.groups(optim.b_rate_ratio)
    ]
    return row.make(groups, weight_decay=optim.weight_decay)
