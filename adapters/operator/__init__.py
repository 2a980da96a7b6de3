"""The operator: one step's rows, each with its own adapter, through layers that all share.

At a linear layer with frozen weight W (NF4) and bias b, for a token of adapter k:

    y = Q[k] ( g[k] ⊙ ( W R[k] (p[k] ⊙ x) + Σ_j s_j ⊙ (B_j (d_j ⊙ (A_j x))) + S[k] x ) ) + b_eff[k]

`install` swaps the layers of a model for wrappers. Before each forward pass the engine says which
rows belong to whom (`OperatorContext.segments`); a wrapper looks up its path, and where no adapter
of the step has a delta it is the plain layer. Rows never mix: every product here is by rows, so a
NaN in one adapter stays in its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from base.spec import BaseSpec

from .embedding import AdaptedEmbedding
from .layer import AdaptedLayer, OperatorContext
from .linear import AdaptedLinear
from .norm import AdaptedNorm
from .segments import Segment, Segments
from .slotted import SlottedOperator

__all__ = [
    "AdaptedEmbedding",
    "AdaptedLayer",
    "AdaptedLinear",
    "AdaptedNorm",
    "OperatorContext",
    "Segment",
    "Segments",
    "SlottedOperator",
    "install",
]


def install(model: Any, spec: BaseSpec) -> OperatorContext:
    """Wrap the linears, embeddings and norms that `spec` names, in place.

    The output head (`model.get_output_embeddings()`) follows the context's `logit_segments`.
    """
    context = OperatorContext()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    wrappers: tuple[tuple[Iterable[str], type[AdaptedLayer]], ...] = (
        (spec.linears, AdaptedLinear),
        (spec.embeddings, AdaptedEmbedding),
        (spec.norms, AdaptedNorm),
    )
    for paths, wrapper in wrappers:
        for path in paths:
            parent, _, name = path.rpartition(".")
            inner = model.get_submodule(path)
            if isinstance(inner, AdaptedLayer):
                raise ValueError(f"{path} is wrapped already: install once for each model")
            if inner is head:
                context.head = path
            context.layers[path] = wrapper(path, inner, context)
            setattr(model.get_submodule(parent), name, context.layers[path])
    return context
