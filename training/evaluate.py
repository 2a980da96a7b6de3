"""Exact match by greedy generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from base.load import Base
from training.data.batches import pad_id
from training.methods import Attached

WORTH_CUTTING = 0.75  # a batch goes on without its ended rows once so few are left


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """How many answers were right, to the letter, of how many."""

    right: int
    total: int

    @property
    def rate(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate: Wilson, "Probable inference", JASA 22 (1927)."""
        p, z2n = self.rate, 1.959964**2 / self.total
        centre = p + z2n / 2
        spread = math.sqrt(z2n * (p * (1 - p) + z2n / 4))
        return max(0.0, (centre - spread) / (1 + z2n)), min(1.0, (centre + spread) / (1 + z2n))


def exact_match(
    base: Base,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    adapter: Attached | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> ExactMatch:
    """Generate greedily from each prompt and compare, leading and trailing blanks aside."""
    said = generate(
        base,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        adapter=adapter,
        report=report,
    )
    pairs = zip(said, answers, strict=True)
    return ExactMatch(sum(got.strip() == want.strip() for got, want in pairs), len(answers))


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    adapter: Attached | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The greedy continuation of each prompt up to the stop token, in the order of `prompts`.

    `report` hears how many prompts are done.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    done = 0
    for chosen in _groups(order, prompts, batch_size, adapter):
        outputs = _greedy(base, [prompts[i] for i in chosen], max_new_tokens, adapter)
        for i, tokens in zip(chosen, outputs, strict=True):
            texts[i] = base.tokenizer.decode(tokens, skip_special_tokens=True)
        done += len(chosen)
        report(done)
    return texts


def _groups(
    order: Sequence[int], prompts: Sequence[Sequence[int]], size: int, adapter: Attached | None
) -> Iterator[Sequence[int]]:
    """Batches in order; of one length each where padding would stand between virtual tokens and
    the prompt and so move their positions apart."""
    alike = adapter is not None and adapter.virtual_tokens > 0
    stretches: Iterable[Sequence[int]] = [order]
    if alike:
        stretches = (list(g) for _, g in groupby(order, key=lambda i: len(prompts[i])))
    for stretch in stretches:
        for start in range(0, len(stretch), size):
            yield stretch[start : start + size]


@torch.no_grad()
def _greedy(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    adapter: Attached | None,
) -> list[list[int]]:
    """One batch, padded on the left so that all rows end at the same column."""
    width = max(len(prompt) for prompt in prompts)
    virtual = adapter.virtual_tokens if adapter else 0
    tokens = torch.full((len(prompts), width), pad_id(base.tokenizer), dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    tokens, mask = tokens.to(base.device), mask.to(base.device)
    stop = base.tokenizer.eos_token_id
    said: list[list[int]] = [[] for _ in prompts]
    first: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if not virtual:
        first["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    run = adapter.forward if adapter else base.model
    out = run(**first, use_cache=True, logits_to_keep=1)
    mask = torch.cat([mask.new_ones(len(prompts), virtual), mask], dim=1)
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    ended: set[int] = set()
    for _ in range(max_new_tokens):
        tokens = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        for row, token in zip(rows, tokens.flatten().tolist(), strict=True):
            if token == stop:
                ended.add(row)
            if row not in ended:
                said[row].append(token)
        if len(ended) == len(prompts):
            break
        cache = out.past_key_values
        going = [at for at, row in enumerate(rows) if row not in ended]
        if len(going) <= WORTH_CUTTING * len(rows):
            kept = torch.tensor(going, device=base.device)
            cache.batch_select_indices(kept)
            tokens, mask, rows = tokens[kept], mask[kept], [rows[at] for at in going]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        out = base.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=mask.cumsum(dim=1)[:, -1:] - 1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return said
