"""The embedding table and the output head, smaller than in float32 and computed with in float32.

On a CPU that computes in float32, weights that were saved in bfloat16 stay so: half the memory, and
half the bytes that the head's product reads. No digit is lost, since float32 holds each of them.

In the fast precision the head is kept in 8 bits, and a table that is tied to it too: there is one
copy, which both read. A table of its own stays as it was, since a step reads few rows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from base.kernels import BLOCK, PanelWeight, dense_linear, panels_serve
from base.nf4 import NF4Linear

Table = TypeVar("Table", bound=nn.Embedding)
Linear = TypeVar("Linear", bound=nn.Linear)

_TILE_ROWS = 4096  # rows that are in float32 at a time


class StoredEmbedding(nn.Embedding):
    """Rows of a table in its own dtype, looked up as float32, times Gemma's scale if it has one."""

    embed_scale: Tensor | None

    def forward(self, ids: Tensor) -> Tensor:
        rows = functional.embedding(ids, self.weight, self.padding_idx).float()
        return rows if self.embed_scale is None else rows * self.embed_scale


class StoredLinear(nn.Linear):
    """y = x Wᵀ + b with W in its own dtype: x [..., in] -> y [..., out] in x's."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return functional.linear(x, self.weight.to(x.dtype), self.bias)
        return dense_linear(x, self.weight, self.bias)


class RoundedEmbedding(nn.Embedding):
    """Rows of a table in 8 bits, looked up as float32, times Gemma's scale if it has one."""

    embed_scale: Tensor | None
    weight: PanelWeight  # type: ignore[assignment]

    def __init__(self, weight: PanelWeight, like: nn.Embedding) -> None:
        empty = torch.empty(weight.shape, device="meta")  # given: see `empty_table`
        super().__init__(*weight.shape, padding_idx=like.padding_idx, _weight=empty)
        del self._parameters["weight"]  # as in NF4Linear, it is no Parameter
        self.weight = weight
        self.embed_scale = getattr(like, "embed_scale", None)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.rows(ids)
        return rows if self.embed_scale is None else rows * self.embed_scale


class RoundedLinear(NF4Linear):
    """An output head in 8 bits, not in NF4: a byte for each weight, a scale for 64 of a row."""


def empty_table(kind: type[Table], rows: int, width: int, padding_idx: int | None) -> Table:
    """An embedding whose weight is on the meta device and was never filled: torch's own way to
    fill one there imports its compiler, which takes seconds.
    """
    weight = torch.empty(rows, width, device="meta")
    return kind(rows, width, padding_idx=padding_idx, _weight=weight, _freeze=True)


def empty_linear(kind: type[Linear], out: int, inner: int, bias: bool) -> Linear:
    """A linear layer like that; torch's constructor has no way around the filling."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.in_features, made.out_features = inner, out
    made.weight = nn.Parameter(torch.empty(out, inner, device="meta"), requires_grad=False)
    own = nn.Parameter(torch.empty(out, device="meta"), requires_grad=False) if bias else None
    made.register_parameter("bias", own)
    return made


def table_rows(weight: Tensor | PanelWeight, ids: Tensor) -> Tensor:
    """Rows of a table's or head's weight: ids [...] -> [..., width], in its dtype or float32."""
    if isinstance(weight, PanelWeight):
        return weight.rows(ids)
    return functional.embedding(ids, weight)


def float_rows(weight: Tensor | PanelWeight, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a table's or head's weight in float32: for work by tiles."""
    if isinstance(weight, PanelWeight):
        return weight.dequantize_rows(start, stop)
    return weight[start:stop].detach().float()


def holds(weight: Tensor | PanelWeight, other: Tensor) -> bool:
    """Is `other` what this table or head was made of, to the bit that it keeps?"""
    if isinstance(weight, PanelWeight):
        return torch.equal(PanelWeight.quantize8(other).panels, weight.panels)
    return torch.equal(other, weight.to(other.dtype))


def is_copy(copy: Tensor, weight: Tensor | PanelWeight) -> bool:
    """Is a float32 `copy` the checkpoint's own weight, as far as is still known of that?

    Training and serving in half precision may each have rounded it once, and 8 bits too.
    """
    for start in range(0, copy.shape[0], _TILE_ROWS):
        tile = copy[start : start + _TILE_ROWS]
        own = float_rows(weight, start, start + len(tile))
        allowed = 2**-7 * torch.maximum(own.abs(), tile.abs()) + 1e-6  # own may be 0 alone
        if isinstance(weight, PanelWeight):  # half a step of a block's 254
            steps = own.view(len(tile), -1, BLOCK).abs().amax(-1, keepdim=True) / 254
            allowed += steps.expand(-1, -1, BLOCK).reshape(own.shape)
        if not bool(((tile - own).abs() <= allowed).all()):
            return False
    return True


def round_head(
    model: Any, quantize: Callable[[Tensor], PanelWeight] = PanelWeight.quantize8
) -> None:
    """Put the output head, and the table that is tied to it, in 8 bits: the fast precision.

    They stay as they are without the C library, off the CPU, where a module is of a class that is
    not known here, and where rows are no multiple of 64.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    weight = None if head is None else head._parameters.get("weight")
    if weight is None or not _can_round(weight) or type(head) not in (nn.Linear, StoredLinear):
        return
    tied = weight is table._parameters.get("weight")
    if tied and not (type(table) is StoredEmbedding or keeps_dtype(model, table)):
        return
    panels = quantize(weight)
    place_rounded(model, head, panels)
    if tied:
        place_rounded(model, table, panels)


def place_rounded(model: Any, module: nn.Module, panels: PanelWeight) -> None:
    """Put a table or head in 8 bits in the place of one that may be empty yet."""
    path = next(path for path, known in model.named_modules() if known is module)
    own: RoundedEmbedding | RoundedLinear
    if isinstance(module, nn.Embedding):
        own = RoundedEmbedding(panels, module)
    else:
        own = RoundedLinear(panels, module._parameters["bias"])
    model.set_submodule(path, own.train(module.training))


def _can_round(weight: Tensor) -> bool:
    return panels_serve() and weight.is_cpu and weight.shape[1] % BLOCK == 0


def keeps_dtype(model: Any, module: nn.Module) -> bool:
    """Can this module of a loaded model keep a weight in another dtype than the model's?"""
    if module is model.get_output_embeddings():
        return type(module) is nn.Linear
    if module is not model.get_input_embeddings():
        return False
    if not isinstance(model.get_output_embeddings(), nn.Linear | RoundedLinear):
        return False  # it may share the weight
    scaled = type(module).__name__.endswith("TextScaledWordEmbedding")
    return type(module) is nn.Embedding or scaled


def swap_stored(model: Any) -> None:
    """Put the modules above in the place of those whose weight has another dtype than float32."""
    for path, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype is torch.float32 or not keeps_dtype(model, module):
            continue
        rows, width = weight.shape
        own: StoredEmbedding | StoredLinear
        if isinstance(module, nn.Embedding):
            own = empty_table(StoredEmbedding, rows, width, module.padding_idx)
            own.embed_scale = getattr(module, "embed_scale", None)
        else:
            own = empty_linear(StoredLinear, rows, width, bias=False)
            own.bias = module._parameters["bias"]
        own.weight = weight
        model.set_submodule(path, own.train(module.training))
