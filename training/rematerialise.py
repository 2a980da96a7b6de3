"""What a forward pass keeps for the way back, cut down: cheap tensors are made again.

A norm's output and a gated feed-forward part's product are as wide as what they are made of, and
autograd would keep both. Here a tensor knows what it is made of; the layer that reads it keeps that
instead (training/layers.py), which something else keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Classes of transformers whose forward is down(silu(gate x) * up x).
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
# And whose forward is w x / sqrt(mean(x²) + ε), all but the product with w in float32.
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_MADE = "_made"  # of a tensor: the Made that it is


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is `make(*parts)`, to the bit."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


def made_of(x: Tensor) -> Made | None:
    """How x can be made again, where it knows."""
    found: Made | None = getattr(x, _MADE, None)
    return found


def _knowing(x: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """x, which knows how it was made while a gradient is asked for."""
    if x.requires_grad:
        setattr(x, _MADE, Made(make, parts))
    return x


def product(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) ⊙ u, without a gradient."""
    return F.silu(g).mul_(u)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return product(g, u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        sigma = torch.sigmoid(g)
        silu = g * sigma
        # silu' = σ (1 + g (1 - σ)) = σ + silu (1 - σ)
        slope = sigma.addcmul_(silu, 1 - sigma)
        return slope.mul_(u).mul_(grads[0]), silu.mul_(grads[0])


def gated(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) ⊙ u."""
    p: Tensor = _Gated.apply(g, u)  # type: ignore[no-untyped-call]
    return _knowing(p, product, g, u)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w x / sqrt(mean(x²) + ε), without a gradient: x [..., width], w [width]."""
    wide = x.to(torch.float32)
    return weight * (wide * _inverse_rms(wide, epsilon)).to(x.dtype)


def _inverse_rms(wide: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)


class _Normed(torch.autograd.Function):
    """Keeps x alone: w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return normed(x, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        wide = x.to(torch.float32)
        inverse = _inverse_rms(wide, ctx.epsilon)
        h = wide * inverse
        grad = (grads[0] * weight).to(torch.float32)
        # ∂L/∂x = (grad - h mean(grad ⊙ h)) / rms
        mean = (grad * h).mean(-1, keepdim=True)
        return grad.sub_(h.mul_(mean)).mul_(inverse).to(x.dtype), None, None


@contextmanager
def lean(model: Any) -> Iterator[None]:
    """Within it, the model's norms and feed-forward parts that are known work so."""
    modules = [(module, forward) for module in model.modules() if (forward := _lean(module))]
    for module, forward in modules:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward


def _lean(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward that does as the module's own and keeps less; None where it is not known."""
    name = type(module).__name__
    if "forward" in vars(module) or type(module).__module__.partition(".")[0] != "transformers":
        return None
    if name in GATED:
        silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        return _feed_forward if silu else None
    frozen = name in RMS_NORMS and not module.get_parameter("weight").requires_grad
    return _norm if frozen else None


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
    return y


def _norm(module: Any, x: Tensor) -> Tensor:
    weight, epsilon = module.weight, module.variance_epsilon
    y: Tensor = _Normed.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return _knowing(y, lambda x: normed(x, weight, epsilon), x)
