"""The recipe: AdamW over the adapter's parameters, warm-up and cosine, clipped gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from base.load import Base
from training.config import OptimConfig, TrainConfig
from training.data import IGNORED, Example, TrainBatch, batches, collate, pad_id
from training.methods import Attached

FLOOR = 0.1  # of the rate, where the cosine ends


@dataclass(frozen=True, slots=True)
class Step:
    """One step, after it ran."""

    number: int  # from 1
    loss: float  # mean over the tokens of the batch that bear loss
    learning_rate: float
    tokens: int  # of all kinds, padding left out


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run did."""

    steps: int
    tokens: int
    seconds: float
    parameters: int  # that were trained
    loss: float  # mean of the last tenth of the steps
    eval_loss: float | None  # mean over the loss tokens of the evaluation data


def train(
    base: Base,
    adapter: Attached,
    data: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    report: Callable[[Step], None],
) -> Trained:
    """Train the attached adapter in place; `report` hears of each step."""
    torch.manual_seed(config.seed)
    parameters = adapter.parameters()
    optim = config.optim
    optimizer = adamw(adapter, optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, optim))
    stream = batches(data, optim.batch_size, pad_id(base.tokenizer), config.seed)
    losses: list[float] = []
    tokens = 0
    start = time.perf_counter()
    adapter.train(True)
    for number in range(1, optim.steps + 1):
        batch = next(stream)
        loss = batch_loss(base, batch, adapter)
        penalty = adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        optimizer.step()
        adapter.after_update(number)
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch.attention_mask.sum())
        losses.append(loss.item())
        report(Step(number, losses[-1], float(schedule.get_last_lr()[0]), tokens))
        schedule.step()
    adapter.train(False)
    last = losses[-max(1, len(losses) // 10) :]
    return Trained(
        steps=optim.steps,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        parameters=sum(parameter.numel() for parameter in parameters),
        loss=sum(last) / len(last),
        eval_loss=mean_loss(base, held_out, optim.batch_size, adapter) if held_out else None,
    )


def adamw(adapter: Attached, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the adapter, with a rate of its own for each group."""
    groups = [
        {"params": group["params"], "lr": optim.learning_rate * group["ratio"]}
        for group in adapter.groups(optim.b_rate_ratio)
    ]
    return torch.optim.AdamW(groups, weight_decay=optim.weight_decay)


def batch_loss(base: Base, batch: TrainBatch, adapter: Attached | None = None) -> Tensor:
    """Mean cross-entropy over the tokens that bear loss. Logits are made for these columns only."""
    following = batch.labels[:, 1:].to(base.device)  # what each position is to say
    columns = (following != IGNORED).any(dim=0).nonzero().flatten()
    tokens, mask = batch.input_ids.to(base.device), batch.attention_mask.to(base.device)
    if adapter is None:
        logits = base.model(
            input_ids=tokens, attention_mask=mask, logits_to_keep=columns, use_cache=False
        ).logits
    else:
        logits = adapter.logits(tokens, mask, columns)  # [B, columns, vocabulary]
    return F.cross_entropy(
        logits.float().flatten(0, 1), following[:, columns].flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def mean_loss(
    base: Base, data: Sequence[Example], batch_size: int, adapter: Attached | None = None
) -> float:
    """Mean cross-entropy over all loss tokens of `data`, in nats."""
    total, count = 0.0, 0
    ordered = sorted(data, key=lambda example: len(example.tokens))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_id(base.tokenizer))
        total += batch_loss(base, batch, adapter).item() * batch.loss_tokens
        count += batch.loss_tokens
    return total / count


def rate(step: int, optim: OptimConfig) -> float:
    """The part of the learning rate that `step`, from 0, is run with."""
    warmup = max(1, round(optim.steps * optim.warmup))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, optim.steps - warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
