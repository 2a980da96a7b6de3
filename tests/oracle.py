"""What the tests take from `service/conformance`: the oracle, tiny bases, adapters of every kind.

A new kind of adapter gets its recipe in service/conformance/recipes.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from adapters.limits import Limits
from adapters.manifest import AdapterManifest, adapter_digest
from adapters.validate import validate
from adapters.vocabulary import Tokens
from base.spec import BaseSpec
from service.conformance.oracle import (
    VIRTUAL_KINDS,
    Greedy,
    PeftOracle,
    nf4_round,
    ready_peft,
    relative_error,
)
from service.conformance.recipes import (
    ALL_LINEARS,
    ATTENTION,
    FEED_FORWARD,
    make_adapter,
)
from service.conformance.tiny import (
    ARCHITECTURES,
    CHAT_TEMPLATE,
    TIED,
    VOCABULARY,
    make_base,
    random_tokens,
)
from service.conformance.tiny import tokenizer as _tokenizer

__all__ = [
    "ALL_LINEARS",
    "ARCHITECTURES",
    "ATTENTION",
    "CHAT_TEMPLATE",
    "FEED_FORWARD",
    "TIED",
    "VIRTUAL_KINDS",
    "VOCABULARY",
    "Greedy",
    "PeftOracle",
    "_tokenizer",
    "edit_adapter",
    "make_adapter",
    "make_base",
    "nf4_round",
    "random_tokens",
    "read_manifest",
    "ready_peft",
    "relative_error",
]

transformers_logging.disable_progress_bar()


def read_manifest(
    adapter: str | Path, spec: BaseSpec, tokenizer: Any = None, **fields: Any
) -> AdapterManifest:
    """The manifest of a saved adapter, validated as an upload is but kept in no store.

    `tokenizer` is the base's; without one it is the tiny bases'.
    """
    adapter = Path(adapter)
    config = (adapter / "adapter_config.json").read_bytes()
    weights = adapter / "adapter_model.safetensors"
    tokens = _tokens_beside(adapter, tokenizer)
    found = validate(config, weights, spec, Limits(), tokens)
    own_tokenizer = sha256(tokens.own).hexdigest() if tokens.own else None
    content = weights.read_bytes()
    address = sha256(content).hexdigest()
    own: dict[str, Any] = {
        "digest": adapter_digest(address, found.config, spec.fingerprint, own_tokenizer),
        "vocabulary": found.vocabulary,
        "tokenizer_sha256": own_tokenizer,
        "name": adapter.name,
        "version": 1,
        "kind": found.kind,
        "rank": found.rank,
        "targets": found.targets,
        "base_fingerprint": spec.fingerprint,
        "config": found.config,
        "weights_sha256": address,
        "weights_bytes": len(content),
        "memory_bytes": found.memory_bytes,
    }
    return AdapterManifest(**{**own, **fields})


def _tokens_beside(adapter: Path, tokenizer: Any) -> Tokens:
    """The tokenizer that `make_adapter` saved with new tokens, beside the base's own."""
    path = adapter / "tokenizer.json"
    own = path.read_bytes() if path.exists() else None
    return replace(Tokens.of(tokenizer or _tiny_tokenizer()), own=own)


_tiny_tokenizer = cache(_tokenizer)


def edit_adapter(
    directory: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
) -> Path:
    """Damage a saved adapter: overwrite config fields and tensors (None removes one)."""
    directory = Path(directory)
    if config is not None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    if tensors is not None:
        weights = directory / "adapter_model.safetensors"
        kept: dict[str, torch.Tensor | None] = {**load_file(str(weights)), **tensors}
        save_file({k: v for k, v in kept.items() if v is not None}, str(weights))
    return directory
