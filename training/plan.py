"""What a run would do and cost, found out by trying: resolved config, memory, time, loss tokens."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml  # type: ignore[import-untyped]
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from base.load import Base
from base.machine import inspect
from training.config import TrainConfig
from training.data import Example, length_of
from training.data.batches import TrainBatch
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
    rows: int  # that are computed at once
    rows_that_fit: int  # into what is free
    sample: Example

    @property
    def too_large(self) -> bool:
        return self.peak_bytes > self.free_bytes


def make_plan(base: Base, data: Sequence[Example], config: TrainConfig) -> Plan:
    """Try one and two rows of the longest batch, which tells the memory that all of it needs; then
    the whole of it where that fits, and a few ordinary ones, for the time.

    The adapter is taken out again; nothing is kept.
    """
    adapter = attach(base, config)
    try:
        run = Run(base, adapter, data, config)
        epochs = config.optim.steps / run.batches.per_epoch
        trial = _tried(run)
        free = _free(base)
        seconds = (
            [_timed(run) for _ in range(TRIAL_STEPS)]
            if trial.peak <= free
            else [trial.seconds_per_row * config.optim.batch_size]
        )
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
        peak_bytes=trial.peak,
        free_bytes=free,
        rows=trial.rows,
        rows_that_fit=trial.rows_within(free),
        sample=data[0],
    )


@dataclass(frozen=True, slots=True)
class _Trial:
    """What batches of the longest examples took."""

    rows: int  # that are computed at once
    one: int  # bytes at the peak of a batch of one row
    more: int  # for each further row
    peak: int  # of a whole one: foretold, and measured where that fits
    seconds_per_row: float

    def rows_within(self, free: int) -> int:
        if self.one > free:
            return 0
        return self.rows if self.peak <= free else 1 + (free - self.one) // max(1, self.more)


def _tried(run: Run) -> _Trial:
    heaviest = run.batches.heaviest()
    rows = len(heaviest.parts(run.config.optim.micro_batch_size)[0].input_ids)
    _peak_of(run, heaviest, 1)  # the first step makes the optimiser's state
    started = time.perf_counter()
    one = _peak_of(run, heaviest, 1)
    seconds = time.perf_counter() - started
    more = max(0, _peak_of(run, heaviest, 2) - one) if rows > 1 else 0
    peak = one + (rows - 1) * more
    if peak <= _free(run.base):
        peak = _peak_of(run, heaviest, rows)
    return _Trial(rows, one, more, peak, seconds)


def _peak_of(run: Run, batch: TrainBatch, rows: int) -> int:
    """Bytes at the peak of a step with the first `rows` of the batch; all there are where they do
    not fit."""
    places = batch.position_ids
    part = replace(
        batch,
        input_ids=batch.input_ids[:rows],
        attention_mask=batch.attention_mask[:rows],
        labels=batch.labels[:rows],
        position_ids=None if places is None else places[:rows],
    )
    given = run.batches
    run.batches = iter([part])  # type: ignore[assignment]
    _reset_peak()
    try:
        run.step()
        return _peak(run.base)
    except torch.OutOfMemoryError:
        return int(torch.cuda.mem_get_info(run.base.device)[1]) + 1
    finally:
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
    with suppress(OSError):  # Linux: 5 sets the process's peak to what it has now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(base: Base) -> int:
    """Of the device, or of the process since the reset; without Linux, since it began."""
    if base.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(base.device))
    with suppress(OSError, IndexError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _free(base: Base) -> int:
    """What the run may use: what is free now and what this process holds already."""
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
        return int(free) + torch.cuda.memory_reserved(base.device)
    return inspect().memory_available + int(psutil.Process().memory_info().rss)


def _base_parameters(base: Base) -> int:
    packed = (shape for shape in base.spec.linears.values() if shape.quantized)
    linears = sum(shape.in_features * shape.out_features for shape in packed)
    return int(linears + sum(p.numel() for p in base.model.parameters()))


def figures(plan: Plan, config: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    """The plan for programs; memory in bytes, times in seconds; `answer` bears loss."""
    names = ("parameters", "base_parameters", "examples", "tokens", "loss_tokens", "longest")
    costs = ("epochs", "seconds_per_step", "peak_bytes", "free_bytes", "rows", "rows_that_fit")
    return {
        **{name: getattr(plan, name) for name in (*names, *costs)},
        "seconds": plan.seconds_per_step * config.optim.steps,
        "fits": not plan.too_large,
        "sample": {
            "prompt": tokenizer.decode(plan.sample.tokens[: plan.sample.answer_start]),
            "answer": tokenizer.decode(plan.sample.tokens[plan.sample.answer_start :]),
        },
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
        table.add_row("", what_would_fit(plan, config))
    return Group(Text(text), table, Text(), highlighted(plan.sample, tokenizer))


def what_would_fit(plan: Plan, config: TrainConfig) -> str:
    """In one sentence."""
    if plan.rows_that_fit:
        rows = f"optim.micro_batch_size={plan.rows_that_fit}"
        return f"{rows} would fit, with the same steps, or a shorter data.max_length"
    shorter = f"a data.max_length far below {min(plan.longest, config.data.max_length)}"
    if not config.optim.checkpointing:
        shorter = f"optim.checkpointing=true, or {shorter}"
    if config.method.kind == "full":
        return f"not even one row: method.kind=lora over NF4, a smaller base, or {shorter}"
    return f"not even one row: a smaller base, or {shorter}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
