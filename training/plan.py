"""What a run would do and cost, found out by trying: resolved config, memory, time, loss tokens."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import yaml  # type: ignore[import-untyped]
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from base.load import Base
from training.config import TrainConfig
from training.data import Example, length_of
from training.data.report import highlighted
from training.methods import attach
from training.recipe import Run

TRIAL_STEPS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory in bytes. Times are of this machine as it was while the trial ran."""

    parameters: int  # that are trained
    base_parameters: int
    examples: int
    epochs: float
    loss_tokens: int  # of all examples
    tokens: int
    longest: int
    seconds_per_step: float  # of an average batch
    peak_bytes: int  # of the process, with the longest batch
    free_bytes: int
    sample: Example

    @property
    def too_large(self) -> bool:
        return self.peak_bytes > self.free_bytes


def make_plan(base: Base, data: Sequence[Example], config: TrainConfig) -> Plan:
    """Try the longest batch once, for the memory, and a few ordinary ones, for the time.

    The adapter is taken out again; nothing is kept.
    """
    adapter = attach(base, config)
    try:
        run = Run(base, adapter, data, config)
        _reset_peak()
        epochs = config.optim.steps / run.batches.per_epoch
        _try_longest(run)
        seconds = [_timed(run) for _ in range(TRIAL_STEPS)]
        peak, free = _peak(base), _free(base)
        parameters = sum(p.numel() for p in run.parameters)
    finally:
        adapter.detach()
        gc.collect()
    return Plan(
        parameters=parameters,
        base_parameters=_base_parameters(base),
        examples=len(data),
        epochs=epochs,
        loss_tokens=sum(example.loss_tokens for example in data),
        tokens=sum(length_of(data, i) for i in range(len(data))),
        longest=max(length_of(data, i) for i in range(len(data))),
        seconds_per_step=sorted(seconds)[len(seconds) // 2],
        peak_bytes=peak,
        free_bytes=free,
        sample=data[0],
    )


def _try_longest(run: Run) -> None:
    given = run.batches
    run.batches = iter([given.heaviest()])  # type: ignore[assignment]
    run.step()
    run.batches = given


def _timed(run: Run) -> float:
    started = time.perf_counter()
    run.step()
    if run.base.device.type == "cuda":
        torch.cuda.synchronize(run.base.device)
    return time.perf_counter() - started


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak(base: Base) -> int:
    """Of the device, or of the process: ru_maxrss counts kilobytes, on macOS bytes."""
    if base.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(base.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _free(base: Base) -> int:
    """What the run may use: what is free now and what this process holds already."""
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
        return int(free) + torch.cuda.memory_reserved(base.device)
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def _base_parameters(base: Base) -> int:
    packed = (shape for shape in base.spec.linears.values() if shape.quantized)
    linears = sum(shape.in_features * shape.out_features for shape in packed)
    return int(linears + sum(p.numel() for p in base.model.parameters()))


def figures(plan: Plan, config: TrainConfig) -> dict[str, Any]:
    """The plan for programs; memory in bytes, times in seconds."""
    names = ("parameters", "base_parameters", "examples", "tokens", "loss_tokens", "longest")
    costs = ("epochs", "seconds_per_step", "peak_bytes", "free_bytes")
    return {
        **{name: getattr(plan, name) for name in (*names, *costs)},
        "seconds": plan.seconds_per_step * config.optim.steps,
        "fits": not plan.too_large,
    }


def described(plan: Plan, config: TrainConfig, tokenizer: Any) -> RenderableType:
    """The plan for people."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    table = Table(show_header=False, box=None)
    total = plan.seconds_per_step * config.optim.steps
    share = plan.parameters / plan.base_parameters
    table.add_row("trained parameters", f"{plan.parameters:,} ({share:.2%} of the base)")
    table.add_row(
        "data",
        f"{plan.examples:,} examples, {plan.tokens:,} tokens, {plan.loss_tokens:,} of them bear "
        f"loss; the longest has {plan.longest:,}; {plan.epochs:.1f} epochs",
    )
    table.add_row("a step", f"{plan.seconds_per_step:.2f} s")
    table.add_row("all steps", _duration(total))
    verdict = "[red]does not fit[/]" if plan.too_large else "fits"
    table.add_row("peak memory", f"{_gib(plan.peak_bytes)} of {_gib(plan.free_bytes)}: {verdict}")
    if plan.too_large:
        table.add_row("", "a smaller optim.batch_size or data.max_length needs less")
    return Group(Text(text), table, Text(), highlighted(plan.sample, tokenizer))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
