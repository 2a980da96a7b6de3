"""The recipe: AdamW over the adapter's parameters, warm-up and cosine, clipped gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from base.load import Base
from training.allocator import return_large_tensors
from training.attention import by_document
from training.config import OptimConfig, TrainConfig
from training.data import Example, length_of
from training.data.batches import Batches, TrainBatch, collate, pad_id
from training.data.corpus import digest_of
from training.data.packing import refuse_if_mixed
from training.distributed import ALONE, World, part_of, whole
from training.errors import ConfigError, RunError
from training.loss import batch_loss, head_of
from training.methods import METHODS, Attached
from training.optimizers import optimizer
from training.recompute import recomputed, refuse_if_not_recomputable
from training.rematerialise import lean

FLOOR = 0.1  # of the rate, where the cosine ends


@dataclass(frozen=True, slots=True)
class Step:
    """One step, after it ran."""

    number: int  # from 1
    loss: float  # mean over the tokens of the batch that bear loss
    learning_rate: float
    tokens: int  # of all kinds, padding left out, since the run began
    seconds: float = 0.0  # of all steps, since the run began
    eval_loss: float | None = None  # where this step was evaluated


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run did."""

    steps: int
    tokens: int
    seconds: float
    parameters: int  # that were trained
    loss: float  # mean of the last tenth of the steps
    eval_loss: float | None  # of the weights that are kept
    ended: str = "steps"  # or "tokens", "minutes", "patience", "asked"
    best_step: int | None = None  # whose weights are kept, where the run was evaluated on its way
    published: str | None = None  # name@version, where it went to a store or a server

    def figures(self) -> dict[str, Any]:
        """All there is of it, for JSON, which has no NaN."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        return {k: v for k, v in found.items() if not isinstance(v, float) or math.isfinite(v)}


@dataclass(slots=True)
class Progress:
    """Where a run is: with the weights, the optimiser and torch's generator, all of its state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0  # evaluations since the best one


class Run:
    """One training run, a step at a time; `state` and `restore` make it resume bit for bit."""

    def __init__(
        self,
        base: Base,
        adapter: Attached,
        data: Sequence[Example],
        config: TrainConfig,
        world: World = ALONE,
    ) -> None:
        return_large_tensors()
        self.base, self.adapter, self.config, self.world = base, adapter, config, world
        self.parameters = adapter.parameters()
        world.start_alike(self.parameters)
        self.optimizer = optimizer(adapter, config.optim, base.device)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate(step, config.optim)
        )
        pad = pad_id(base.tokenizer)
        pack = config.data.max_length if config.data.packing else None
        if pack is not None:
            refuse_if_mixed(base.model, base.device, adapter.virtual_tokens)
        share = (world.rank, world.size)
        self.batches = Batches(data, config.optim.batch_size, pad, config.seed, pack, share)
        if world.sharded and config.optim.micro_batch_size is not None:
            what = "optim.micro_batch_size with FSDP: all processes fetch a layer's parts together"
            raise ConfigError(f"{what}; a smaller optim.batch_size is right", "optim")
        if config.optim.checkpointing:
            kind = config.method.kind
            refuse_if_not_recomputable(base.model, kind, METHODS[kind].through_cache)
        adapter.train(False)  # a fresh one drops, and a trial must not
        head_of(base)
        self.progress = Progress()
        self.best: dict[str, Any] | None = None  # the adapter's state at the best evaluation

    def step(self) -> Step:
        """One update."""
        started = time.perf_counter()
        batch, progress, world = next(self.batches), self.progress, self.world
        self.adapter.train(True)
        (loss_tokens,) = world.sums(batch.loss_tokens)
        # The mean over the tokens of all processes is the sum of their parts of it.
        losses = [
            self._gradients(part, loss_tokens, penalised=number == 0)
            for number, part in enumerate(batch.parts(self.config.optim.micro_batch_size))
        ]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        world.add_up(self.parameters)
        most = self.config.optim.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, most)
        if not math.isfinite(
            float(whole(norm))
        ):  # alike in all processes: no update spoils a weight
            raise RunError(self._diverged(f"gradients that are not finite, loss {loss.item():.4g}"))
        self.optimizer.step()
        progress.step += 1
        self.adapter.after_update(progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.adapter.train(False)
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        passed = time.perf_counter() - started
        mean, tokens, seconds = world.sums(loss.item(), batch.tokens, passed / world.size)
        progress.losses.append(mean)
        progress.tokens += int(tokens)
        progress.seconds += seconds
        return Step(
            progress.step, progress.losses[-1], learning_rate, progress.tokens, progress.seconds
        )

    def _gradients(self, batch: TrainBatch, loss_tokens: float, penalised: bool) -> Tensor:
        """Add those of the batch's part of a step's loss; that part."""
        with lean(self.base.model), self._attention(batch), self._twice():  # on the way back too
            share = batch.loss_tokens / loss_tokens
            loss = batch_loss(self.base, batch, self.adapter) * share
            penalty = self.adapter.penalty() if penalised else None
            total = loss if penalty is None else loss + penalty / self.world.size
            (total * self.world.gain).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _diverged(self, found: str) -> str:
        rate = float(self.schedule.get_last_lr()[0])
        return (
            f"step {self.progress.step + 1:,} has {found}: the run diverged at a rate of "
            f"{rate:.3g}; a lower optim.learning_rate is needed, or a longer optim.warmup"
        )

    def _attention(self, batch: TrainBatch) -> AbstractContextManager[None]:
        """Virtual tokens come with a mask, and with positions of their own."""
        if self.adapter.virtual_tokens:
            return nullcontext()
        return by_document(self.base.model, batch.input_ids.shape[1])

    def _twice(self) -> AbstractContextManager[None]:
        again = self.config.optim.checkpointing
        return recomputed(self.base.model) if again else nullcontext()

    def evaluate(self, held_out: Sequence[Example]) -> float:
        """The loss on `held_out`; the best weights so far are kept."""
        progress = self.progress
        loss = self.loss_on(held_out)
        if not math.isfinite(loss):
            raise RunError(self._diverged(f"a held-out loss of {loss}"))
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            self.best = self.adapter.state()
        else:
            progress.worse += 1
        return loss

    def loss_on(self, data: Sequence[Example]) -> float:
        size = self.config.optim.batch_size
        return mean_loss(self.base, data, size, self.adapter, self.world)

    @property
    def ended(self) -> str | None:
        """Why there is no further step, if there is none."""
        progress, config = self.progress, self.config
        if progress.step >= config.optim.steps:
            return "steps"
        if config.budget.tokens is not None and progress.tokens >= config.budget.tokens:
            return "tokens"
        if config.budget.minutes is not None and progress.seconds >= 60 * config.budget.minutes:
            return "minutes"
        if config.eval.patience is not None and progress.worse >= config.eval.patience:
            return "patience"
        return None

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        return {
            "adapter": self.adapter.state(),
            "best": self.best,
            "optimizer": _whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "cursor": self.batches.cursor,
            "progress": asdict(self.progress),
            "random": self.world.gathered(torch.get_rng_state()),  # [processes, bytes]
            "device_random": self.world.gathered(torch.cuda.get_rng_state())
            if torch.cuda.is_available()
            else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises ConfigError where other processes than now made it."""
        rank, processes = self.world.rank, len(state["random"])
        if processes != self.world.size:
            raise ConfigError(f"the checkpoint is of {processes} processes, now {self.world.size}")
        self.adapter.restore(state["adapter"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():  # bitsandbytes counts steps by a plain int
                if getattr(value, "shape", None) == parameter.shape:
                    moments[name] = part_of(value, parameter)
        self.schedule.load_state_dict(state["schedule"])
        self.batches.cursor = state["cursor"]
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"][rank].clone())
        if state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"][rank].clone())


def _whole(state: Any) -> Any:
    """An optimiser's state, whose tensors may be in parts."""
    if isinstance(state, dict):
        return {key: _whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_whole(value) for value in state]
    return whole(state) if isinstance(state, Tensor) else state


def train(
    base: Base,
    adapter: Attached,
    data: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    report: Callable[[Step], None],
    *,
    resume: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda state: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> Trained:
    """Train the attached adapter in place; `report` hears of each step.

    `keep` is given the run's state every `config.checkpoint_every` steps and at the end; `resume`
    is one of these. A run that was evaluated on its way ends with its best weights. Of several
    processes only the first reports and keeps.
    """
    torch.manual_seed(config.seed + world.rank)  # each drops out other elements
    rows = {"data.train": digest_of(data), "what is held out": digest_of(held_out)}
    if resume is not None:
        refuse_other_rows(rows, resume.get("rows", {}))
    run = Run(base, adapter, data, config, world)
    if resume is not None:
        run.restore(resume)
    stopped = False
    while run.ended is None and not stopped:
        step = run.step()
        if _due(step.number, config) and held_out:
            step = Step(**{**asdict(step), "eval_loss": run.evaluate(held_out)})
        if world.leads:
            report(step)
        stopped = world.any(asked_to_stop())
        if step.number % config.checkpoint_every == 0 or stopped or run.ended:
            state = {**run.state(), "rows": rows}
            if world.leads:
                keep(state)
    return _finished(run, held_out, "asked" if stopped and run.ended is None else run.ended or "")


def refuse_other_rows(rows: Mapping[str, str], kept: Mapping[str, str]) -> None:
    """Raises ConfigError where a checkpoint was made with other rows: to go on with these would
    show some twice and others never. One that is older than this says nothing of its rows."""
    for name, digest in rows.items():
        if kept.get(name, digest) != digest:
            raise ConfigError(
                f"{name} is not what the checkpoint was made with: bring back those rows, or begin "
                "anew with --overwrite",
                "data.train",
            )


def _due(step: int, config: TrainConfig) -> bool:
    every = config.eval.every
    return every is not None and (step % every == 0 or step == config.optim.steps)


def _finished(run: Run, held_out: Sequence[Example], ended: str) -> Trained:
    progress, loss = run.progress, run.progress.best_loss
    if run.best is not None:
        run.adapter.restore(run.best)
    elif held_out and ended != "asked":
        loss = run.loss_on(held_out)
    last = progress.losses[-max(1, len(progress.losses) // 10) :]
    return Trained(
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        parameters=sum(parameter.numel() for parameter in run.parameters),
        loss=sum(last) / len(last) if last else math.nan,
        eval_loss=loss,
        ended=ended,
        best_step=progress.best_step,
    )


@torch.no_grad()
def mean_loss(
    base: Base,
    data: Sequence[Example],
    batch_size: int,
    adapter: Attached | None = None,
    world: World = ALONE,
) -> float:
    """Mean cross-entropy over all loss tokens of `data`, in nats."""
    total, count = 0.0, 0
    ordered = sorted(range(len(data)), key=lambda i: length_of(data, i))
    starts = range(0, len(ordered), batch_size)
    for first in range(0, len(starts), world.size):
        mine = first + world.rank
        start = starts[min(mine, len(starts) - 1)]  # all run as often: shards are fetched together
        chosen = [data[i] for i in ordered[start : start + batch_size]]
        batch = collate(chosen, pad_id(base.tokenizer))
        loss = batch_loss(base, batch, adapter).item()
        if mine < len(starts):
            total += loss * batch.loss_tokens
            count += batch.loss_tokens
    total, tokens = world.sums(total, count)
    return total / tokens


def rate(step: int, optim: OptimConfig) -> float:
    """The part of the learning rate that `step`, from 0, is run with."""
    warmup = max(1, round(optim.steps * optim.warmup))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, optim.steps - warmup))
    return FLOOR + (1 - FLOOR) * _SCHEDULES[optim.schedule](progress)


_SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def with_steps(config: TrainConfig, data: Sequence[Example]) -> TrainConfig:
    """The config with the steps that its epochs come to on this data, where it names epochs."""
    optim = config.optim
    if optim.epochs is None:
        return config
    pack = config.data.max_length if config.data.packing else None
    each = Batches(data, optim.batch_size, 0, config.seed, pack).per_epoch
    steps = max(1, round(optim.epochs * each))
    return config.model_copy(update={"optim": optim.model_copy(update={"steps": steps})})
