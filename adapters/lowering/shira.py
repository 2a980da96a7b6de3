"""SHiRA: S, whose entries stand where the file says, put in the order of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.delta import Delta, LinearDelta
from adapters.errors import InvalidAdapter
from adapters.maps import Sparse
from base.load import Base

from .checkpoint import AdapterCheckpoint
from .whole import lower_saved


def lower_shira(
    config: Mapping[str, Any], checkpoint: AdapterCheckpoint, base: Base
) -> dict[str, Delta]:
    """A delta for each module that the canonical config names. Raises InvalidAdapter."""
    deltas: dict[str, Delta] = lower_saved(config, checkpoint, base)
    for path in config["target_modules"]:
        shape = base.spec.linears[path]
        checkpoint.take_base_copy(path, base.linear(path).weight)
        height, width = shape.out_features, shape.in_features
        entries = config["r"] * (height + width)
        values = checkpoint.take(f"{path}.shira_weight", entries)
        name = f"{path}.shira_indices"
        places = checkpoint.take(name, 2, entries).long()  # exact in float32 up to 2^24
        bounds = torch.tensor([[height], [width]], device=places.device)
        if not bool(((places >= 0) & (places < bounds)).all()):
            raise InvalidAdapter(f"points outside of the weight, [{height}, {width}]", name)
        deltas[path] = LinearDelta(sparse=by_rows(values, places, height))
    return deltas


def by_rows(values: Tensor, places: Tensor, height: int) -> Sparse:
    """Entries [n] at places [2, n] (row, column), in any order."""
    rows, order = places[0].sort(stable=True)
    edges = torch.arange(height + 1, device=rows.device)
    starts = torch.searchsorted(rows, edges)
    return Sparse(values[order], places[1, order].to(torch.int32), starts.to(torch.int32))
