"""The engine's limits, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from base.load import Base

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine is bounded by."""

    block_size: int = 16  # tokens
    kv_cache_bytes: int = GIB // 2
    max_model_len: int | None = None  # tokens of prompt and output; None: the base's positions
    max_sequences: int = 64  # that run at once
    max_step_tokens: int = 512  # of all chunks in one step
    max_waiting: int = 1024  # sequences in the queue
    host_cache_bytes: int = 2 * GIB
    slot_bytes: int = 2 * GIB
    max_loads: int = 64  # adapters on their way to memory, before requests for others are refused
    load_workers: int = 2

    def blocks_for(self, base: Base) -> int:
        """Blocks that fit in `kv_cache_bytes`, but no more than all sequences could fill."""
        spec = base.spec
        token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * base.dtype.itemsize
        affordable = self.kv_cache_bytes // (token * self.block_size)
        length = min(spec.max_positions, self.max_model_len or spec.max_positions)
        useful = (-(-length // self.block_size)) * self.max_sequences
        if affordable < 2:
            raise ValueError(
                f"kv_cache_bytes={self.kv_cache_bytes} holds less than two blocks of "
                f"{self.block_size} tokens; one needs {token * self.block_size} bytes"
            )
        return min(affordable, useful)
