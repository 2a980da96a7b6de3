"""The training of mini, from a seed: resumable, on two cores or on a GPU.

The schedule is driven by progress from 0 to 1. With a number of steps only, progress is
step / steps and the run is a function of the seed; with a budget of minutes it is the larger of
that and the share of the budget that has passed, so the run ends in time on a busy machine.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from base.mini import held_out, model, packing, tokenizer
from base.mini.environment import environment
from base.mini.scoring import score

STEPS = 9_000
RATE = 3e-3
WARM_UP = 50
DECAY_FROM = 0.42
WATCH_EVERY = 250


@dataclass(frozen=True)
class Budget:
    """How long to train; `minutes` ends the schedule early where the machine is too slow."""

    steps: int = STEPS
    minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        passed = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(step / self.steps, passed))


@dataclass
class State:
    """Where a run stands."""

    seed: int
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def rate(step: int, progress: float) -> float:
    """Warm-up, a plateau, then a linear decay to zero."""
    left = 1.0 if progress < DECAY_FROM else (1.0 - progress) / (1.0 - DECAY_FROM)
    return RATE * min(1.0, (step + 1) / WARM_UP) * left


def optimizer(net: Qwen3ForCausalLM) -> torch.optim.AdamW:
    """AdamW in fp32; weight decay on matrices only."""
    named = list(net.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bf16(where: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones there (else the run stays in fp32)."""
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Checkpoint:
    """One directory that always holds a whole checkpoint: safetensors and JSON, no pickle."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, net: Qwen3ForCausalLM, adam: torch.optim.AdamW, state: State) -> None:
        fresh = self.directory.with_name(self.directory.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        tensors = {f"model.{name}": p.detach() for name, p in net.named_parameters()}
        for name, p in net.named_parameters():
            for key, value in adam.state[p].items():
                tensors[f"{key}.{name}"] = value
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, fresh / "tensors")
        (fresh / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
        old = self.directory.with_name(self.directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(old)
        fresh.rename(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, net: Qwen3ForCausalLM, adam: torch.optim.AdamW) -> State | None:
        if not (self.directory / "state.json").exists():
            return None
        tensors = load_file(self.directory / "tensors")
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(tensors[f"model.{name}"])
                adam.state[p] = {
                    "step": tensors[f"step.{name}"].to(p.device),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(p.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(p.device),
                }
        text = (self.directory / "state.json").read_text(encoding="utf-8")
        return State(**json.loads(text))


def _as_it_is(module: torch.nn.Module, dynamic: bool) -> torch.nn.Module:
    return module


class Trainer:
    """One step of the training: batch, loss, update."""

    def __init__(self, net: Qwen3ForCausalLM, compiled: bool) -> None:
        self.net = net
        self.adam = optimizer(net)
        self.half = has_fast_bf16(net.device)
        compile_or_not: Callable[..., Any] = torch.compile if compiled else _as_it_is
        self.body: Callable[..., Any] = compile_or_not(net.model, dynamic=False)

    def loss(self, packed: packing.Packed) -> torch.Tensor:
        """Mean loss over the weighted tokens; the vocabulary is only computed for these."""
        ids = packed.ids.to(self.net.device)
        weights = packed.weights.to(self.net.device)[:, 1:].flatten()
        at = weights.nonzero().squeeze(1)
        with torch.autocast(self.net.device.type, torch.bfloat16, enabled=self.half):
            hidden = self.body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = self.net.lm_head(hidden.flatten(0, 1)[at])
        targets = ids[:, 1:].flatten()[at]
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        return (losses * weights[at]).sum() / weights.sum()

    def step(self, packed: packing.Packed, learning_rate: float) -> float:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        loss = self.loss(packed)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        return float(loss.detach())


def watch(net: Qwen3ForCausalLM, tok: Tokenizer, count: int) -> dict[str, float]:
    """Exact match on a few held-out items: what tells whether copying has formed."""
    items = held_out.context_items(1, 4 * count)
    groups = {
        f"{size} facts": [item.document for item in items if item.facts == size]
        for size in held_out.SIZES
    }
    groups["not in the passages"] = held_out.unknown_items(1, 4 * count)
    groups |= held_out.task_items(1, count)
    found = {}
    for name, documents in groups.items():
        scores = score(net, tok, documents)
        found[name] = sum(s.exact for s in scores) / len(scores)
    return found


def _tokenizer(out: Path, seed: int) -> Tokenizer:
    if not (out / "tokenizer.json").exists():
        tokenizer.save(tokenizer.train(seed), out)
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def _log(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        refresh_per_second=0.5,
    )


def build(
    out: Path,
    seed: int = 0,
    budget: Budget | None = None,
    resume: bool = False,
    stop_at: int | None = None,
    compiled: bool | None = None,
    checkpoint_every: float = 180.0,
) -> Path:
    """Train mini into `out` and return it.

    `out` receives the files a base has (tokenizer, config, weights), renewed at each checkpoint,
    and `out/run` the checkpoint and a log in JSON lines. `resume` goes on from the checkpoint;
    `stop_at` ends after that step with a checkpoint (the schedule stays that of `budget`).
    `compiled` uses `torch.compile` (default: where a C++ compiler is found or on a GPU).
    """
    budget = budget or Budget()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    run = out / "run"
    run.mkdir(parents=True, exist_ok=True)
    tok = _tokenizer(out, seed)
    net = model.fresh(tok, seed).to(device())
    if compiled is None:
        compiled = shutil.which("g++") is not None
    trainer = Trainer(net, compiled)
    checkpoint = Checkpoint(run / "checkpoint")
    state = (checkpoint.load(net, trainer.adam) if resume else None) or State(seed)
    if state.seed != seed:
        raise ValueError(f"{run} was started with seed {state.seed}, not {seed}")
    _train(trainer, tok, budget, state, checkpoint, out, stop_at, checkpoint_every)
    model.save(net, tok, out)
    _record(out, trainer, budget, state)
    return out


def _record(out: Path, trainer: Trainer, budget: Budget, state: State) -> None:
    """`training.json`: how these weights came about, for the card."""
    told = {
        "seed": state.seed,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds),
        "minutes": budget.minutes,
        "rate": RATE,
        "dtype": "bfloat16" if trainer.half else "float32",
        "environment": environment(trainer.net.device.type),
    }
    model.replace_file(out / "training.json", json.dumps(told, indent=2) + "\n")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that the run ends with a checkpoint."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: told.set()) for number in numbers]
    try:
        yield told
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _train(
    trainer: Trainer,
    tok: Tokenizer,
    budget: Budget,
    state: State,
    checkpoint: Checkpoint,
    out: Path,
    stop_at: int | None,
    checkpoint_every: float,
) -> None:
    started = time.monotonic() - state.seconds
    saved = time.monotonic()
    log = out / "run" / "log.jsonl"
    mean = 0.0
    with _bar() as bar, _stop_signals() as told:
        task = bar.add_task("training", total=1.0)
        while (progress := budget.progress(state.step, state.seconds)) < 1.0:
            packed = packing.batch(tok, state.seed, state.step, progress)
            loss = trainer.step(packed, rate(state.step, progress))
            mean = loss if state.step == 0 else 0.95 * mean + 0.05 * loss
            state.step += 1
            state.tokens += packed.ids.numel()
            state.seconds = time.monotonic() - started
            bar.update(task, completed=progress, description=f"step {state.step} loss {mean:.3f}")
            if state.step % 50 == 0:
                line = {**asdict(state), "progress": progress, "loss": mean}
                if state.step % WATCH_EVERY == 0:
                    line["exact"] = watch(trainer.net, tok, 6)
                _log(log, line)
            if time.monotonic() - saved > checkpoint_every:
                checkpoint.save(trainer.net, trainer.adam, state)
                model.save(trainer.net, tok, out)
                saved = time.monotonic()
            if state.step == stop_at or told.is_set():
                break
    checkpoint.save(trainer.net, trainer.adam, state)
