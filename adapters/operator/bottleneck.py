"""A bottleneck adapter after a layer: y' = y + U φ(D z + c) + u + e r, for its own rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from adapters.activations import ACTIVATIONS
from adapters.delta import Bottleneck


def add_bottleneck(y: Tensor, delta: Bottleneck, stream: Tensor | None) -> None:
    """In place: y [n, width] of the layer, and the residual stream r [n, width] if it is read."""
    z = y if delta.reads_output else None
    if stream is not None and delta.reads_stream:
        z = stream if z is None else z + stream
    assert z is not None, "a bottleneck reads the layer's output, the stream or both"
    dtype = delta.down.dtype
    inner = functional.linear(z.to(dtype), delta.down, delta.down_bias.to(dtype))
    inner = ACTIVATIONS[delta.activation](inner)
    own = functional.linear(inner, delta.up, delta.up_bias.to(dtype))
    if stream is not None and delta.extra:
        own = own + delta.extra * stream
    y += own.to(y.dtype)
