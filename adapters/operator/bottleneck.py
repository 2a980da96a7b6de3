"""A bottleneck adapter after a layer: y' = y + U φ(D z + c) + u + e r, for its own rows."""

from __future__ import annotations

from torch import Tensor

from adapters.activations import ACTIVATIONS
from adapters.delta import Bottleneck
from base import kernels


def add_bottleneck(y: Tensor, delta: Bottleneck, stream: Tensor | None) -> None:
    """In place: y [n, width] of the layer, and the residual stream r [n, width] if it is read."""
    z = y if delta.reads_output else None
    if stream is not None and delta.reads_stream:
        z = stream if z is None else z + stream
    assert z is not None, "a bottleneck reads the layer's output, the stream or both"
    inner = kernels.dense_linear(z, delta.down, delta.down_bias)
    own = kernels.dense_linear(ACTIVATIONS[delta.activation](inner), delta.up, delta.up_bias)
    if stream is not None and delta.extra:
        own = own + delta.extra * stream
    y += own
