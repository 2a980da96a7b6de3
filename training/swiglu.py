"""A gated feed-forward part that keeps two tensors for its gradient where autograd keeps four.

p = silu(g) ⊙ u is computed again from g and u wherever a gradient asks for it: by the product
itself, and by the layer that reads p, which would keep it as its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Classes of transformers whose forward is down(silu(gate x) * up x).
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
_PARTS = "_parts"  # of a tensor p: the g and u that it is made of


def product(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) ⊙ u, without a gradient."""
    return F.silu(g).mul_(u)


def parts_of(p: Tensor) -> tuple[Tensor, Tensor] | None:
    """The g and u of a p that `gated` made."""
    parts: tuple[Tensor, Tensor] | None = getattr(p, _PARTS, None)
    return parts


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
    """silu(g) ⊙ u, which knows its parts while a gradient is asked for."""
    p: Tensor = _Gated.apply(g, u)  # type: ignore[no-untyped-call]
    if p.requires_grad:
        setattr(p, _PARTS, (g, u))
    return p


@contextmanager
def lean(model: Any) -> Iterator[None]:
    """Within it, the model's feed-forward parts that are known work so."""
    modules = [m for m in model.modules() if _known(m)]
    for module in modules:
        module.forward = partial(_forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _known(module: nn.Module) -> bool:
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return silu and type(module).__name__ in GATED and "forward" not in vars(module)


def _forward(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
    return y
