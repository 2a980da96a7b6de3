"""The loss of a batch, without ever holding the logits of all its tokens.

With a vocabulary of 150,000 the logits of one token weigh as much as 150 of its hidden states. They
are made for the tokens that bear loss alone, some hundreds at a time, and turned into a gradient of
the hidden states at once: what stays is as wide as the model, not as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.load import Base
from training.data.batches import IGNORED, TrainBatch
from training.methods.method import Attached

LOGITS_BYTES = 1 << 27  # of logits at a time
_TILE_WEIGHTS = 1 << 21  # of a head in another dtype that are cast at a time: 8 MiB
_TRIAL = ((5, 7, 9, 6),)


@dataclass(frozen=True, slots=True)
class Head:
    """logits = c tanh((W h + b) / c) for the last hidden states h; without c, W h + b."""

    path: str  # of the module
    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary], float32."""
        out = hidden.new_empty(len(hidden), len(self.weight), dtype=torch.float32)
        for start, stop, tile in self._tiles(hidden.dtype):
            if hidden.dtype is torch.float32:
                torch.mm(hidden, tile.t(), out=out[:, start:stop])
            else:
                out[:, start:stop] = hidden @ tile.t()
        if self.bias is not None:
            out += self.bias
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of h from that of W h: [n, vocabulary] -> [n, hidden]."""
        out = grad.new_zeros(len(grad), self.weight.shape[1])
        for start, stop, tile in self._tiles(dtype):
            out += grad[:, start:stop].to(dtype) @ tile
        return out

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, W[start:stop] in `dtype`), each cast in the memory of the one before."""
        rows, width = self.weight.shape
        if self.weight.dtype is dtype:
            yield 0, rows, self.weight
            return
        count = max(1, _TILE_WEIGHTS // width)
        memory = self.weight.new_empty(min(count, rows), width, dtype=dtype)
        for start in range(0, rows, count):
            stop = min(start + count, rows)
            yield start, stop, memory[: stop - start].copy_(self.weight[start:stop])


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of h [n, hidden] against targets [n]; its gradient is made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, wanted: bool) -> Tensor:
        grads, losses = [], []
        rows = max(1, LOGITS_BYTES // (4 * len(head.weight)))
        pieces = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        for h, target in pieces:
            logits = head.logits(h)
            at = torch.arange(len(h), device=h.device), target
            picked, largest = logits[at], logits.amax(dim=1)
            steepness = None if head.softcap is None or not wanted else _steepness(logits, head)
            odds = logits.sub_(largest[:, None]).exp_()
            total = odds.sum(dim=1)
            losses.append(total.log() + largest - picked)
            if wanted:
                grad = odds.div_(total[:, None])
                grad[at] -= 1
                if steepness is not None:
                    grad *= steepness
                grads.append(head.backward(grad.div_(len(hidden)), hidden.dtype))
        ctx.grad = torch.cat(grads).to(hidden.dtype) if wanted else None
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.grad * grads[0], None, None, None


def _steepness(logits: Tensor, head: Head) -> Tensor:
    assert head.softcap is not None
    return 1 - (logits / head.softcap).square()


def cross_entropy(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Mean cross-entropy in nats: h [n, hidden], targets [n] int64. Differentiable in h."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    loss: Tensor = _CrossEntropy.apply(hidden, targets, head, wanted)  # type: ignore[no-untyped-call]
    return loss


def batch_loss(base: Base, batch: TrainBatch, adapter: Attached | None = None) -> Tensor:
    """Mean cross-entropy over the tokens of the batch that bear loss."""
    following = batch.labels[:, 1:].to(base.device)  # what each position is to say
    bears = following != IGNORED
    head = head_of(base)
    if head is None or head.weight.requires_grad:
        return _plain_loss(base, batch, adapter, following, bears)
    with _tapped(base.model, head.path) as tap:
        _forward(base, batch, adapter)
    hidden = tap.seen  # [B, virtual tokens + L, hidden]
    hidden = hidden[:, hidden.shape[1] - batch.input_ids.shape[1] :][:, :-1]
    return cross_entropy(hidden[bears], following[bears], head)


def _forward(base: Base, batch: TrainBatch, adapter: Attached | None, **more: Any) -> Any:
    """Rows are padded on their right, where a causal model does not look: so no mask is needed,
    and attention without one is cheaper. Virtual tokens are PEFT's, and it wants a mask."""
    run = base.model if adapter is None else adapter.forward
    tokens = batch.input_ids.to(base.device)
    if batch.position_ids is not None:  # transformers keeps packed examples apart without a mask
        more["position_ids"] = batch.position_ids.to(base.device)
    elif adapter is not None and adapter.virtual_tokens:
        more["attention_mask"] = batch.attention_mask.to(base.device)
    return run(input_ids=tokens, use_cache=False, **more)


def _plain_loss(
    base: Base, batch: TrainBatch, adapter: Attached | None, following: Tensor, bears: Tensor
) -> Tensor:
    """The same by way of the model's own logits, at the columns where any row bears loss."""
    columns = bears.any(dim=0).nonzero().flatten()
    if adapter is not None and adapter.virtual_tokens:
        tokens, mask = batch.input_ids.to(base.device), batch.attention_mask.to(base.device)
        logits = adapter.logits(tokens, mask, columns)  # [B, columns, vocabulary]
    else:
        logits = _forward(base, batch, adapter, logits_to_keep=columns).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), following[:, columns].flatten(), ignore_index=IGNORED
    )


_HEADS: WeakKeyDictionary[Any, Head | None] = WeakKeyDictionary()


def head_of(base: Base) -> Head | None:
    """The head of a base whose logits are what `Head` says; None where they are something else.

    A model may scale its logits or bend them otherwise, so it is tried, once for each model; the
    first time while no dropout is on.
    """
    if base.model not in _HEADS:
        _HEADS[base.model] = _tried(base)
    return _HEADS[base.model]


@torch.no_grad()
def _tried(base: Base) -> Head | None:
    module = base.model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module.weight.data) is not Tensor:  # a DTensor
        return None
    path = next(path for path, found in base.model.named_modules() if found is module)
    softcap = getattr(base.model.config, "final_logit_softcapping", None)
    head = Head(path, module.weight, module.bias, softcap)
    tokens = torch.tensor(_TRIAL, device=base.device)
    want = base.model(input_ids=tokens, use_cache=False).logits[0].float()
    with _tapped(base.model, path) as tap:
        base.model(input_ids=tokens, use_cache=False)
    near = 1e-4 if base.dtype is torch.float32 else 2e-2
    same = tap.seen is not None and torch.allclose(
        head.logits(tap.seen[0]), want, rtol=0, atol=near * float(want.abs().max())
    )
    return head if same else None


class _Tap(nn.Module):
    """Stands where the head does and keeps what comes in."""

    seen: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return hidden[..., :1]  # the model may do with its logits what it likes


@contextmanager
def _tapped(model: Any, path: str) -> Iterator[_Tap]:
    head, tap = model.get_submodule(path), _Tap()
    model.set_submodule(path, tap)
    try:
        yield tap
    finally:
        model.set_submodule(path, head)
