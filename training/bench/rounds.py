"""The arms take turns, a step each, so that what else the machine does falls on all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from base.load import load_base
from training.bench.arm import WARMUP, ArmOrder, Turn, config_of
from training.bench.stream import Shape, batches
from training.errors import TrainingError
from training.methods import attach

ARMS = {  # name -> (kind of process, method); the first is what the others are held against
    "nibble": ("nibble", "lora"),
    "trainer": ("trainer", "lora"),
    "trainer-packed": ("trainer-packed", "lora"),
    "nibble-dora": ("nibble", "dora"),
    "trainer-packed-dora": ("trainer-packed", "dora"),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """What one arm did; the first turns, which warm up, are in `losses` alone."""

    name: str
    turns: tuple[Turn, ...]
    losses: tuple[float, ...]
    peak_bytes: int
    tokens: int  # of the counted steps, padding left out

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(turn.seconds for turn in self.turns)


def measure(
    base: Path,
    arms: Sequence[str],
    shape: Shape,
    steps: int,
    *,
    rank: int = 16,
    learning_rate: float = 1e-3,
    threads: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[Arm]:
    """Run `steps` counted steps of each arm in turns. Raises TrainingError where one dies."""
    with tempfile.TemporaryDirectory() as folder:
        orders = [
            ArmOrder(
                kind=ARMS[name][0],
                method=ARMS[name][1],
                base=str(base),
                start=str(Path(folder) / ARMS[name][1]),
                steps=steps + WARMUP,
                rank=rank,
                learning_rate=learning_rate,
                threads=threads,
                shape=shape,
            )
            for name in arms
        ]
        say("the adapters that the arms start with")
        vocabulary = _write_starts(orders)
        children = [_Child(name, order) for name, order in zip(arms, orders, strict=True)]
        try:
            for number in range(steps + WARMUP):
                for child in children:
                    child.step()
                    say(f"step {number + 1} of {steps + WARMUP}: {child.said()}")
        finally:
            for child in children:
                child.end()
    counted = batches(shape, steps + WARMUP, vocabulary)[WARMUP:]
    tokens = sum(int(batch.attention_mask.sum()) for batch in counted)
    return [child.arm(tokens) for child in children]


def _write_starts(orders: Sequence[ArmOrder]) -> int:
    """An adapter for each method, so that all arms of it start alike; the base's vocabulary."""
    base = load_base(orders[0].base, device="cpu", dtype="float32")
    for order in orders:
        if not Path(order.start).exists():
            torch.manual_seed(order.shape.seed)
            adapter = attach(base, config_of(order))
            adapter.save(Path(order.start))
            adapter.detach()
    return base.spec.vocab_size


class _Child:
    """An arm's process, started when its first turn comes so that loading is no race."""

    def __init__(self, name: str, order: ArmOrder) -> None:
        self.name, self.order = name, order
        self.process: subprocess.Popen[str] | None = None
        self.turns: list[Turn] = []
        self.peak_bytes = 0

    def step(self) -> None:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "training.bench.arm", json.dumps(asdict(self.order))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self.order.threads)},
            )
        self._hear()  # that it is ready
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._hear()
        self.peak_bytes = int(answer.pop("peak_bytes"))
        self.turns.append(Turn(**answer))

    def said(self) -> str:
        turn = self.turns[-1]
        peak = self.peak_bytes / 2**30
        return (
            f"{self.name} {turn.seconds:.1f} s ({turn.cpu_seconds:.1f} of the CPU), "
            f"loss {turn.loss:.4f}, peak {peak:.2f} GiB"
        )

    def _hear(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise TrainingError(f"the arm {self.name} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def arm(self, tokens: int) -> Arm:
        counted = tuple(self.turns[WARMUP:])
        losses = tuple(turn.loss for turn in self.turns)
        return Arm(self.name, counted, losses, self.peak_bytes, tokens)


def table(arms: Sequence[Arm]) -> Table:
    """Each arm beside the first one: its time and memory as multiples of the first's."""
    shown = Table(
        "arm", "tokens/s", "step, of the first's", "CPU time", "peak memory", "of it", "loss"
    )
    first = arms[0]
    for arm in arms:
        shown.add_row(
            arm.name,
            f"{arm.tokens_per_second:.1f}",
            f"{ratio(arm, first, 'seconds'):.2f} ×",
            f"{ratio(arm, first, 'cpu_seconds'):.2f} ×",
            f"{arm.peak_bytes / 2**30:.2f} GiB",
            f"{arm.peak_bytes / first.peak_bytes:.2f} ×",
            f"{arm.losses[0]:.3f} → {arm.losses[-1]:.3f}",
        )
    return shown


def ratio(arm: Arm, first: Arm, field: str) -> float:
    """The median over the rounds of this arm's time as a multiple of the first's."""
    pairs = zip(arm.turns, first.turns, strict=True)
    return float(statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs))


def as_json(arms: Sequence[Arm], shape: Shape) -> dict[str, Any]:
    """All figures."""
    return {
        "shape": asdict(shape),
        "arms": [
            {
                **asdict(arm),
                "tokens_per_second": arm.tokens_per_second,
                "step_ratio": ratio(arm, arms[0], "seconds"),
                "cpu_ratio": ratio(arm, arms[0], "cpu_seconds"),
                "peak_ratio": arm.peak_bytes / arms[0].peak_bytes,
                "loss_gap": max(
                    abs(a - b) for a, b in zip(arm.losses, arms[0].losses, strict=True)
                ),
            }
            for arm in arms
        ],
    }
