"""Several processes that train together: what each of them takes, and what they add up.

`accelerate launch` starts them. Each computes its rows of every batch; the loss of a row is
divided by the loss tokens of the whole batch, and the gradients are added. So a step is that of
one process on the same batch but for the order of additions, however unlike the shares are; a mean
of the processes' means would weigh a token by how many its neighbours have.

Copies (DDP): each process has the whole model, and what trains is added up in one message.
Shards (FSDP): each has a part of every weight, as `fully_shard` cuts them; for method full.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class World:
    """One process among `size`. A world of one sends nothing."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    device: torch.device = CPU  # where messages are

    @property
    def leads(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    @property
    def gain(self) -> float:
        """What a loss is multiplied by: `fully_shard` divides gradients by the processes."""
        return float(self.size) if self.sharded else 1.0

    def sums(self, *values: float) -> list[float]:
        """Each value, added up over the processes."""
        if self.size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(message)
        return [float(value) for value in message]

    def any(self, flag: bool) -> bool:
        return self.sums(float(flag))[0] > 0

    def gathered(self, state: Tensor) -> Tensor:
        """[size, …]: every process's `state`, bytes on the CPU."""
        if self.size == 1:
            return state[None]
        rows = [torch.empty_like(state, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(rows, state.to(self.device))
        return torch.stack(rows).cpu()

    def start_alike(self, parameters: Iterable[Tensor]) -> None:
        """Everyone begins with the first process's weights."""
        if self.size > 1 and not self.sharded:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes the sum of the processes'. One that nobody has stays away."""
        if self.size == 1 or self.sharded:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        message = torch.cat([has, *parts])
        torch.distributed.all_reduce(message)
        counts = message[: len(parameters)].tolist()
        found = torch.split(message[len(parameters) :], [p.numel() for p in parameters])
        for parameter, gradient, count in zip(parameters, found, counts, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None

    def shard(self, model: Any) -> None:
        """Cut every weight among the processes: each layer by itself, the rest together.

        A whole model has to fit into each process while it is cut.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)


ALONE = World()


def world() -> World:
    """What `accelerate launch` made of this process; alone without it.

    Raises ConfigError for what this program does not do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=not torch.cuda.is_available())  # over gloo, else over nccl
    if state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(f"accelerate's {state.distributed_type.value}: DDP or FSDP is needed")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return World(state.process_index, state.num_processes, sharded, state.device)


def leads() -> bool:
    """Is this the process that writes, or alone?"""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may have a part. Every process has to ask."""
    full = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor if full is None else full()
    return found


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `like`."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    part: Tensor = distribute_tensor(tensor.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]
    return part
