"""Exact match without generation.

Greedy decoding gives exactly the answer if and only if every token of the answer (its end mark
included) is the most likely one after the prompt and the answer's earlier tokens: one forward
pass over prompt and answer decides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from base.mini.dialogue import Document
from base.mini.packing import Tokens, encode


@dataclass(frozen=True)
class Score:
    """Whether all weighted tokens were foretold, their summed loss in nats, their number."""

    exact: bool
    loss: float
    tokens: int


@torch.inference_mode()
def _score(model: Qwen3ForCausalLM, rows: Sequence[Tokens]) -> list[Score]:
    length = max(len(ids) for ids, _ in rows)
    device = model.device
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows], device=device)
    weights = torch.tensor([w + [0.0] * (length - len(w)) for _, w in rows], device=device)
    # Padding stands on the right and attention is causal, so no mask is needed.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    targets, wanted = ids[:, 1:], weights[:, 1:] > 0
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view_as(targets) * wanted
    exact = ((logits.argmax(-1) == targets) | ~wanted).all(1)
    return [
        Score(bool(e), float(loss), int(n))
        for e, loss, n in zip(exact, losses.sum(1), wanted.sum(1), strict=True)
    ]


def score(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, documents: Sequence[Document], rows: int = 32
) -> list[Score]:
    """The score of each document, in order; batches hold documents of like length."""
    encoded = [(ids[:-1], weights[:-1]) for ids, weights in encode(tokenizer, documents)]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    found: dict[int, Score] = {}
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        found.update(zip(chosen, _score(model, [encoded[i] for i in chosen]), strict=True))
    return [found[i] for i in range(len(encoded))]
