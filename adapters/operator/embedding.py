"""The operator at an embedding table: rows of the base's, with what each token's adapter adds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from adapters.delta import Delta, EmbeddingDelta, PrivateEmbedding, PrivateRows, Resized
from base import kernels
from base.dense import table_rows
from base.kernels import PanelWeight

from .layer import AdaptedLayer


class AdaptedEmbedding(AdaptedLayer):
    """The embedding table of the base and of a step's adapters: ids [1, T] -> [1, T, width]."""

    def forward(self, ids: Tensor) -> Tensor:
        plan = self.context.plans.get(self.path)
        if plan is None:
            return self.inner(ids)  # type: ignore[no-any-return]
        rows: Tensor = self.inner(ids.clamp(max=self.weight.shape[0] - 1))  # new tokens have others
        flat = ids.reshape(-1)
        y = rows.reshape(-1, rows.shape[-1]).clone()
        # Gemma's table multiplies what it looks up, so what is added must be multiplied alike.
        scale = getattr(self.inner, "embed_scale", None)
        for start, stop, delta in plan:
            own = _embedding_rows(flat[start:stop], delta, self.weight, y.dtype)
            if scale is not None:
                own = own * torch.as_tensor(scale, device=own.device).to(own.dtype)
            y[start:stop] = own.to(y.dtype)
        return y.view(rows.shape)

    def prepare(self, delta: Delta) -> Delta:
        inner = delta.inner if isinstance(delta, Resized) else delta
        if not isinstance(inner, EmbeddingDelta | PrivateEmbedding | PrivateRows | None):
            raise self.wrong(delta)
        return delta


def _embedding_rows(
    ids: Tensor,
    delta: Delta | None,
    table: Tensor | PanelWeight,
    dtype: torch.dtype,
) -> Tensor:
    """[n] -> [n, width] in the compute dtype, before the table's own scale."""
    if isinstance(delta, Resized):
        return _resized_rows(ids, delta, table, dtype)
    if isinstance(delta, PrivateEmbedding):
        return functional.embedding(ids, delta.weight).to(dtype)
    own = table_rows(table, ids).to(dtype)
    if isinstance(delta, PrivateRows):
        if not len(delta.ids):
            return own
        place = torch.searchsorted(delta.ids, ids).clamp_(max=len(delta.ids) - 1)
        trained = (delta.ids[place] == ids)[:, None]
        return torch.where(trained, delta.rows[place].to(dtype), own)
    if delta is None:
        return own
    assert isinstance(delta, EmbeddingDelta), "prepare refuses the others"
    own = own + kernels.dense_linear(delta.A[:, ids].t().to(dtype), delta.B)
    return own if delta.g is None else own * delta.g.to(dtype)


def _resized_rows(
    ids: Tensor, delta: Resized, table: Tensor | PanelWeight, dtype: torch.dtype
) -> Tensor:
    """Rows of the base's tokens as the inner delta has them, and the adapter's own beyond."""
    first = table.shape[0]
    own = _embedding_rows(ids.clamp(max=first - 1), delta.inner, table, dtype)
    if not len(delta.rows):
        return own
    new = delta.rows[(ids - first).clamp_(min=0)].to(dtype)
    return torch.where((ids >= first)[:, None], new, own)
