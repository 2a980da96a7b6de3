"""Trained tokens: an adapter's own rows of the embedding table and of the output head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from adapters.checks.token_rows import owner
from adapters.delta import Delta, PrivateRows
from adapters.errors import InvalidAdapter
from base.dense import RoundedLinear
from base.kernels import PanelWeight
from base.load import Base
from base.nf4 import NF4Linear

from .checkpoint import AdapterCheckpoint


def lower_trainable_tokens(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """PrivateRows for each target of the canonical config. Raises InvalidAdapter."""
    rows = dict.fromkeys(config["target_modules"], config["token_indices"])
    return lower_token_rows(rows, checkpoint, base, "")


def lower_token_rows(
    rows: Mapping[str, Sequence[int]], checkpoint: AdapterCheckpoint, base: Base, below: str
) -> dict[str, Delta]:
    """`below` is what PEFT puts between a module's path and its rows. Raises InvalidAdapter.

    A head that is tied to the table has the very same rows: PEFT saves them once or twice.
    """
    deltas: dict[str, PrivateRows] = {}
    for path in sorted(rows, key=lambda path: owner(path, rows, base.spec) != path):
        weight = _weight(path, base)
        checkpoint.take_base_copy(f"{path}.{below}".removesuffix("."), weight)
        name, first = f"{path}.{below}trainable_tokens_delta", owner(path, rows, base.spec)
        own = None if first == path else deltas[first]
        if own is None:
            own = _taken(name, rows[path], checkpoint, base, weight.shape[1])
        elif checkpoint.has(name):
            copy = _taken(name, rows[path], checkpoint, base, weight.shape[1])
            if not torch.equal(copy.rows, own.rows):
                raise InvalidAdapter(
                    f"differs from the rows of {first}, to which {path} is tied", name
                )
        deltas[path] = own
    return dict(deltas)


def _taken(
    name: str, tokens: Sequence[int], checkpoint: AdapterCheckpoint, base: Base, width: int
) -> PrivateRows:
    """In the order of the tokens, so that a look-up is a binary search."""
    rows = checkpoint.take(name, len(tokens), width)
    ids, order = torch.tensor(tokens, device=base.device).sort()
    return PrivateRows(ids, rows[order].to(base.dtype))


def _weight(path: str, base: Base) -> torch.Tensor | PanelWeight:
    """[rows, width] of a table, or [out, in] of an output head; in 8 bits in the fast precision."""
    module = base.embedding(path) if path in base.spec.embeddings else base.linear(path)
    weight: Any = module.weight
    assert not isinstance(module, NF4Linear) or isinstance(module, RoundedLinear), path
    return cast(torch.Tensor | PanelWeight, weight)
