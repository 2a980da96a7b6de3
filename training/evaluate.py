"""Exact match by greedy generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from base.load import Base
from training.data import pad_id


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
    report: Callable[[int], None] = lambda done: None,
) -> ExactMatch:
    """Generate greedily from each prompt and compare, leading and trailing blanks aside."""
    said = generate(
        base, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, report=report
    )
    pairs = zip(said, answers, strict=True)
    return ExactMatch(sum(got.strip() == want.strip() for got, want in pairs), len(answers))


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The greedy continuation of each prompt up to the stop token, in the order of `prompts`.

    `report` hears how many prompts are done.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        outputs = _greedy(base, [prompts[i] for i in chosen], max_new_tokens)
        for i, tokens in zip(chosen, outputs, strict=True):
            texts[i] = base.tokenizer.decode(tokens, skip_special_tokens=True)
        report(start + len(chosen))
    return texts


@torch.no_grad()
def _greedy(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """One batch, padded on the left so that all rows end at the same column."""
    width = max(len(prompt) for prompt in prompts)
    shape = (len(prompts), width)
    tokens = torch.full(shape, pad_id(base.tokenizer), dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    tokens, mask = tokens.to(base.device), mask.to(base.device)
    stop = base.tokenizer.eos_token_id
    said: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        out = base.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0)[:, -tokens.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        tokens = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        for row, token in enumerate(tokens.flatten().tolist()):
            if token == stop:
                open_rows.discard(row)
            if row in open_rows:
                said[row].append(token)
        if not open_rows:
            break
    return said
