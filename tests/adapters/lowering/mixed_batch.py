"""Several sequences through one wrapped model in one forward pass, each with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.delta import LoweredAdapter
from adapters.lowering import lower
from adapters.operator import OperatorContext, Segments, install
from base.load import Base, load_base
from tests.oracle import read_manifest

Sequences = Sequence[tuple[Sequence[int], LoweredAdapter | None]]


class Server:
    """A base with the operator installed: the smallest thing that can run a mixed batch."""

    def __init__(self, directory: Path, dtype: str = "float32", **options: Any) -> None:
        self.directory = directory
        self.base: Base = load_base(
            directory, device="cpu", dtype=dtype, cache_dir=directory.parent / "cache", **options
        )
        self.context: OperatorContext = install(self.base.model, self.base.spec)

    def lower(self, adapter: Path, **options: Any) -> LoweredAdapter:
        manifest = read_manifest(adapter, self.base.spec, self.base.tokenizer)
        return lower(manifest, adapter / "adapter_model.safetensors", self.base, **options)

    @torch.inference_mode()
    def run(self, sequences: Sequences, *, last_only: bool = False) -> list[torch.Tensor]:
        """Logits of each sequence, [its length, vocabulary], or [1, vocabulary] of its last token.

        The sequences stand end to end in [1, T]; a block-diagonal mask keeps them apart.
        """
        counts = [len(tokens) for tokens, _ in sequences]
        kept = [1] * len(counts) if last_only else counts
        adapters = [adapter for _, adapter in sequences]
        self.context.segments = Segments.of(zip(counts, adapters, strict=True))
        self.context.logit_segments = Segments.of(zip(kept, adapters, strict=True))
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        visible = (owner[:, None] == owner[None, :]).tril()
        ends = torch.tensor(counts).cumsum(0) - 1
        output = self.base.model(
            input_ids=torch.tensor([[t for tokens, _ in sequences for t in tokens]]),
            position_ids=torch.cat([torch.arange(n) for n in counts])[None],
            attention_mask=visible[None, None],
            use_cache=False,
            logits_to_keep=ends if last_only else 0,
        )
        return list(output.logits[0].float().split(kept))
