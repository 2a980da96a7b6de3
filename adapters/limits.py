"""What one upload may cost: the bounds that every check of an adapter uses."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on an upload. Sizes are bytes; anything above one of them is `TooLarge`."""

    max_config_bytes: int = 256 * KIB
    max_header_bytes: int = MIB
    max_tensors: int = 4096
    max_weights_bytes: int = 2 * GIB
    max_template_bytes: int = 64 * KIB
    max_tokenizer_bytes: int = 32 * MIB
    max_new_rows: int = 65_536  # of a resized vocabulary, beyond the base's
    max_rank: int = 256
    max_scale: float = 1e4  # |alpha / r|
    max_value: float = 1e6  # of any weight: a larger one overflows once the scale is folded in
    child_cpu_seconds: int = 20  # of the validating process: what an upload may cost
    child_seconds: float = 300.0  # wall clock: how long a busy machine may take to give them
    child_memory_bytes: int = GIB  # address space of the validating process
