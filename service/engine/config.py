"""The engine's limits, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from base.kernels import stored_bytes
from base.load import Base

GIB = 1 << 30
CudaGraphs = Literal["auto", "off"]
KVDtype = Literal["auto", "float32", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine is bounded by."""

    block_size: int = 16  # tokens
    kv_cache_bytes: int = GIB // 2
    kv_dtype: KVDtype = "auto"  # of keys and values in the cache; auto is the base's own
    cuda_graphs: CudaGraphs = "auto"  # on a GPU, replay captured steps where one fits
    max_model_len: int | None = None  # tokens of prompt and output; None: the base's positions
    max_sequences: int = 64  # that run at once
    max_step_tokens: int = 512  # of all chunks in one step
    max_waiting: int = 1024  # sequences in the queue
    max_waiting_tokens: int | None = None  # of their prompts; None: any
    host_cache_bytes: int = 2 * GIB
    slot_bytes: int = 2 * GIB
    max_loads: int = 64  # adapters on their way to memory, before requests for others are refused
    load_workers: int = 2

    def kept_dtype(self, base: Base) -> torch.dtype:
        """The dtype of the KV cache; int8 has its scales beside the numbers."""
        own: torch.dtype = base.dtype if self.kv_dtype == "auto" else getattr(torch, self.kv_dtype)
        return own

    def token_bytes(self, base: Base) -> int:
        """Keys and values of one token, in all layers."""
        spec = base.spec
        each = stored_bytes(spec.head_dim, self.kept_dtype(base))
        return 2 * spec.num_layers * spec.num_kv_heads * each

    def blocks_for(self, base: Base) -> int:
        """Blocks that fit in `kv_cache_bytes`, but no more than all sequences could fill."""
        spec, token = base.spec, self.token_bytes(base)
        affordable = self.kv_cache_bytes // (token * self.block_size)
        length = min(spec.max_positions, self.max_model_len or spec.max_positions)
        useful = (-(-length // self.block_size)) * self.max_sequences
        if affordable < 2:
            raise ValueError(
                f"kv_cache_bytes={self.kv_cache_bytes} holds less than two blocks of "
                f"{self.block_size} tokens; one needs {token * self.block_size} bytes"
            )
        return min(affordable, useful)
