"""The memory that a run's weights need at least, told before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from base.architecture import empty_model
from base.checkpoint import read_json
from base.hub import locate
from base.machine import inspect
from base.mini import MINI
from base.scales import double_quant_of
from training.config import TrainConfig
from training.errors import ConfigError

PLAIN = 0.5 + 4 / 64  # bytes a weight: four bits, and a float32 for each 64
DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)  # a byte for each 64, and a float32 for 256 of these
FLOAT = 4.0
TRAINED = 16.0  # the weight, its gradient and AdamW's two moments, in float32


@dataclass(frozen=True, slots=True)
class Weights:
    """How many weights a base has: in its decoder's linear layers, and elsewhere."""

    linears: int
    others: int
    double: bool  # are the scales quantised too?

    @property
    def served(self) -> float:
        """Bytes in NF4, which an adapter is trained over."""
        return self.linears * (DOUBLE if self.double else PLAIN) + self.others * FLOAT

    @property
    def trained(self) -> float:
        """Bytes in floating point while all of them are trained."""
        return (self.linears + self.others) * TRAINED


def weights(base: str, double_quant: bool | None = None) -> Weights:
    """Counted in a model without memory. Raises UnservableBase where there is none."""
    import torch

    directory = MINI if base == "mini" else locate(base, None).directory
    model = empty_model(read_json(directory / "config.json"), torch.float32)
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linears = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    return Weights(linears, total - linears, double_quant_of(directory, double_quant))


def refuse_too_large(config: TrainConfig, free: int | None = None) -> None:
    """Raises ConfigError where not even the weights fit, and says what would."""
    free = _free() if free is None else free
    found, full = weights(config.base, config.double_quant), config.method.kind == "full"
    needed = found.trained if full else found.served
    if needed <= free:
        return
    count = found.linears + found.others
    said = f"base {config.base} has {count:,} weights: {_gib(needed)} to train " + (
        "all of them" if full else "an adapter over them in NF4"
    )
    each = needed / count
    fitting = f"a base of {free / each / 1e9:.1f} billion weights or fewer fits"
    if full and found.served <= free:
        fitting += f", or method lora over this one in NF4: {_gib(found.served)}"
    raise ConfigError(f"{said}, and {_gib(free)} are free; {fitting}", "base")


def _free() -> int:
    machine = inspect()
    return machine.gpus[0].memory_free if machine.gpus else machine.memory_available


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
