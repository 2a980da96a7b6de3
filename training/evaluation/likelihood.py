"""How likely the right answer is: one forward pass over prompt and answer, no generation.

Greedy decoding says exactly the answer if and only if every token of it, the stop token included,
is the most likely one after the prompt and the answer's earlier tokens. So the same pass gives
perplexity, the choice among labels, and exact match.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from base.load import Base
from training.data import Example
from training.data.batches import IGNORED, collate, pad_id
from training.methods import Attached

WORTH = 48  # tokens: a shorter common beginning is not worth a cache
LOGITS = 1 << 23  # numbers of one batch's logits: 32 MiB in float32


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one answer: its summed loss in nats, its tokens, and whether greedy decoding says it."""

    nats: float
    tokens: int
    exact: bool


def likelihoods(
    base: Base,
    data: Sequence[Example],
    *,
    adapter: Attached | None = None,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """The likelihood of each example's `tokens[answer_start:]`, in the order of `data`.

    What all prompts begin with, such as the examples of a few-shot prompt, is computed once.
    """
    found: dict[int, Likelihood] = {}
    shared = 0 if adapter is not None and adapter.virtual_tokens else _shared(data)
    start = _Start(base, adapter, data[0].tokens[:shared]) if shared >= WORTH else None
    rests = data if start is None else [_without(example, shared) for example in data]
    order = sorted(range(len(data)), key=lambda i: len(rests[i].tokens))
    for chosen in _batches(order, rests, batch_size, base.spec.vocab_size):
        rows = [rests[i] for i in chosen]
        found.update(zip(chosen, _batch(base, rows, adapter, start), strict=True))
        report(len(found))
    return [found[i] for i in range(len(data))]


def _shared(data: Sequence[Example]) -> int:
    """How many tokens all prompts begin with; the last token before an answer is not among them,
    for it foretells the answer's first."""
    first = data[0].tokens if data else ()
    length = min((example.answer_start - 1 for example in data), default=0)
    for example in data:
        pairs = zip(first[:length], example.tokens, strict=False)
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), length)
    return max(0, length) if len(data) > 1 else 0


def _without(example: Example, shared: int) -> Example:
    return Example(example.tokens[shared:], example.answer_start - shared)


class _Start:
    """Keys and values of the tokens that all prompts begin with."""

    @torch.no_grad()
    def __init__(self, base: Base, adapter: Attached | None, tokens: Sequence[int]) -> None:
        run = base.model if adapter is None else adapter.forward
        ids = torch.tensor([list(tokens)], device=base.device)
        self.length = len(tokens)
        self._cache = run(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def rows(self, count: int) -> Any:
        """A cache of its own for a batch of `count` rows."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(count)
        return cache


def _batches(
    order: Sequence[int], data: Sequence[Example], size: int, vocabulary: int
) -> list[list[int]]:
    """Groups of like length whose logits stay within bounds."""
    groups: list[list[int]] = []
    widest = 0  # columns of answers in the last group, at most
    for i in order:
        columns = max(widest, len(data[i].tokens))
        full = not groups or len(groups[-1]) == size
        if full or (len(groups[-1]) + 1) * columns * vocabulary > LOGITS:
            groups.append([])
            widest = 0
        groups[-1].append(i)
        widest = max(widest, len(data[i].tokens))
    return groups


@torch.no_grad()
def _batch(
    base: Base, rows: Sequence[Example], adapter: Attached | None, start: _Start | None
) -> list[Likelihood]:
    batch = collate(rows, pad_id(base.tokenizer))
    following = batch.labels[:, 1:].to(base.device)
    columns = (following != IGNORED).any(dim=0).nonzero().flatten()
    wanted = following[:, columns]
    logits = _logits(base, adapter, batch.input_ids, batch.attention_mask, columns, start)
    losses = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(wanted)
    counted = wanted != IGNORED
    exact = ((logits.argmax(dim=-1) == wanted) | ~counted).all(dim=1)
    return [
        Likelihood(float(nats), int(tokens), bool(right))
        for nats, tokens, right in zip(losses.sum(1), counted.sum(1), exact, strict=True)
    ]


def _logits(
    base: Base,
    adapter: Attached | None,
    tokens: Tensor,
    mask: Tensor,
    columns: Tensor,
    start: _Start | None,
) -> Tensor:
    """[B, len(columns), vocabulary] fp32."""
    tokens, mask = tokens.to(base.device), mask.to(base.device)
    if adapter is not None and start is None:
        return adapter.logits(tokens, mask, columns).float()
    run = base.model if adapter is None else adapter.forward
    inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if start is not None:
        before = mask.new_ones(len(mask), start.length)
        places = torch.arange(tokens.shape[1], device=base.device) + start.length
        inputs = {
            "attention_mask": torch.cat([before, mask], dim=1),
            "position_ids": places.expand(len(tokens), -1),
            "past_key_values": start.rows(len(tokens)),
            "use_cache": True,
        }
    logits: Tensor = run(input_ids=tokens, logits_to_keep=columns, **inputs).logits
    return logits.float()


def choose(likelihood: Sequence[Sequence[Likelihood]]) -> list[int]:
    """The most likely choice of each item; the first of equals."""
    return [min(range(len(each)), key=lambda i: each[i].nats) for each in likelihood]
