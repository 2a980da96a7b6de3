"""The attention function that transformers' layers call: it reads and writes the paged cache.

A model hands every layer's queries, keys and values to the function that is registered under its
attention implementation. Ours finds the batch of the running step in a thread-local place:
the engine's thread sets it before the forward pass and clears it after.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from base import attention_functions
from base.kernels import CachePages, StepPages, cache_write, paged_attention, stored_width
from base.spec import BaseSpec
from service.engine.batch import Batch

NAME = "nibble_paged"


class KVCache:
    """Keys and values of all blocks: per layer two tensors [blocks, block_size, heads, width].

    `dtype` is what they are kept in: a float dtype, or int8 with scales (`base.kernels.kv_rows`).
    """

    def __init__(
        self, spec: BaseSpec, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = stored_width(spec.head_dim, dtype)
        shape = (blocks, block_size, spec.num_kv_heads, width)
        self.blocks = blocks
        self.block_size = block_size
        self.dtype = dtype
        self.keys = [_zeros(shape, dtype, device) for _ in range(spec.num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(spec.num_layers)]

    @cached_property
    def pages(self) -> CachePages:
        """For layers that run in C alone: on the CPU."""
        return CachePages(self.keys, self.values)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [T, heads, width] at slots [T] = block * block_size + offset."""
        cache_write(self.keys[layer], slots, k)
        cache_write(self.values[layer], slots, v)

    def fill(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys, values [layers, t, heads, width] at the beginning of a block; t <= its size.

        Positions are in them already.
        """
        first = block * self.block_size
        slots = torch.arange(first, first + keys.shape[1], device=keys.device)
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.write(layer, slots, k, v)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory on the host before they are written: torch would touch each, and
    so would `calloc` (numpy) where it finds room that was used before."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    lazy = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    return torch.frombuffer(lazy, dtype=dtype).view(shape)


@dataclass(slots=True)
class Step:
    """The batch that the layers are computing now, and the layers that asked for it."""

    batch: Batch
    cache: KVCache
    layers: set[int] = field(default_factory=set)

    def pages(self) -> StepPages:
        """The same for layers that run in C alone: they do as `attend` would."""
        batch = self.batch
        return StepPages(
            self.cache.pages,
            *(batch.slot_mapping, batch.block_tables, batch.query_start, batch.context_length),
            self.layers,
        )


_place = threading.local()


@contextmanager
def step(batch: Batch, cache: KVCache) -> Iterator[Step]:
    """Within it, the layers of this thread's model attend over `batch`."""
    _place.step = Step(batch, cache)
    try:
        yield _place.step
    finally:
        _place.step = None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, T, width]
    key: torch.Tensor,  # [1, kv_heads, T, width]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Write K and V of the new tokens, then let each attend to its own sequence: [1, T, H, D]."""
    current: Step | None = getattr(_place, "step", None)
    if current is None:
        raise RuntimeError("the paged attention runs only inside a step of the engine")
    if rest.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not served")
    batch, cache = current.batch, current.cache
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    current.layers.add(layer)
    cache.write(layer, batch.slot_mapping, key[0].transpose(0, 1), value[0].transpose(0, 1))
    out = paged_attention(
        query[0].transpose(0, 1),
        cache.keys[layer],
        cache.values[layer],
        batch.block_tables,
        batch.query_start,
        batch.context_length,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out.unsqueeze(0), None


# Nothing else masks: the block tables tell all.
attention_functions.register(NAME, attend)
