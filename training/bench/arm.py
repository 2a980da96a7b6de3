"""One arm of the bench in a process of its own: a step each time a line comes in.

    python -m training.bench.arm '{"kind": "nibble", ...}'

It prints a line of JSON when it is ready and after each step, with its peak memory until then.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.bench.stream import Shape, batches, unpacked
from training.config import OptimConfig, TrainConfig

WARMUP = 1  # steps that are not counted


@dataclass(frozen=True, slots=True)
class ArmOrder:
    """What a child is told. `start` is the directory of the adapter that every arm begins with."""

    kind: str  # of KINDS
    method: str  # lora or dora
    base: str
    start: str
    steps: int
    rank: int
    learning_rate: float
    threads: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of an arm."""

    seconds: float
    cpu_seconds: float
    loss: float


def config_of(order: ArmOrder) -> TrainConfig:
    """The same run as `nibble train run` takes it."""
    return TrainConfig.model_validate(
        {
            "data": {"train": "none", "max_length": order.shape.length, "packing": True},
            "method": {"kind": order.method, "rank": order.rank, "alpha": 2 * order.rank},
            "optim": {
                "learning_rate": order.learning_rate,
                "steps": order.steps,
                "batch_size": order.shape.rows,
            },
        }
    )


def _nibble(order: ArmOrder) -> None:
    """Our own loop, with these batches."""
    from base.load import load_base
    from training import checkpoint
    from training.recipe import Run

    config = config_of(order)
    base = load_base(order.base, device="cpu", dtype="float32")
    adapter = checkpoint.load(Path(order.start), base)
    given = batches(order.shape, order.steps, base.spec.vocab_size)
    run = Run(base, adapter, _examples(order), config)
    run.batches = iter(given)  # type: ignore[assignment]
    for _ in range(order.steps):
        clock = _turn()
        next(clock)
        clock.send(run.step().loss)


def _examples(order: ArmOrder) -> Any:
    from training.data import Example

    return [Example((5, 6, 7), 1)] * order.shape.rows


def _trainer(order: ArmOrder, packed: bool) -> None:
    """transformers' Trainer with PEFT over bitsandbytes' NF4; bf16 and checkpointing off."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(order.base, dtype=torch.float32)
    given = batches(order.shape, order.steps, model.config.vocab_size)
    model = peft.PeftModel.from_pretrained(model, order.start, is_trainable=True)
    rows = given if packed else [unpacked(batch) for batch in given]
    inputs = [
        {name: value for name, value in _fields(batch).items() if value is not None}
        for batch in rows
    ]
    optim = config_of(order).optim
    arguments = transformers.TrainingArguments(
        output_dir=f"{order.start}-trainer",
        max_steps=order.steps,
        max_grad_norm=optim.max_grad_norm,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    _paced(inputs, model=model, args=arguments, optimizers=_optimizers(model, optim)).train()


def _optimizers(model: torch.nn.Module, optim: OptimConfig) -> tuple[Any, Any]:
    """AdamW and the rate's schedule, as ours are."""
    from training.recipe import rate

    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
    )
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: rate(step, optim))


def _paced(inputs: list[dict[str, Any]], **given: Any) -> Any:
    """A Trainer over `inputs` that waits for its turn before each step."""
    import transformers

    class Paced(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(inputs, batch_size=None, shuffle=False)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            pace.loss = float(loss)
            return loss

    class Pace(transformers.TrainerCallback):  # type: ignore[misc]
        """Hands the turn over before each step and takes it back after the optimiser's."""

        def __init__(self) -> None:
            self.loss = 0.0
            self.clock: Any = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.clock = _turn()
            next(self.clock)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.clock.send(self.loss)

    pace = Pace()
    return Paced(callbacks=[pace], **given)


def _fields(batch: Any) -> dict[str, Any]:
    """What the model is given: packed rows without a mask, so that it keeps examples apart."""
    if batch.position_ids is not None:
        return {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "position_ids": batch.position_ids,
        }
    return {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "attention_mask": batch.attention_mask,
    }


KINDS: dict[str, Callable[[ArmOrder], None]] = {
    "nibble": _nibble,
    "trainer": lambda order: _trainer(order, packed=False),
    "trainer-packed": lambda order: _trainer(order, packed=True),
}


def _turn() -> Generator[None, float, None]:
    """Wait for a line; then time what happens until the loss is sent in."""
    _say({"ready": True})
    if not sys.stdin.readline():
        raise SystemExit(1)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = yield
    turn = Turn(time.perf_counter() - wall, time.process_time() - cpu, loss)
    _say({**asdict(turn), "peak_bytes": _peak()})
    yield


def _peak() -> int:
    """ru_maxrss counts kilobytes, on macOS bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _say(message: dict[str, Any]) -> None:
    _out.write(json.dumps(message) + "\n")
    _out.flush()


if __name__ == "__main__":
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    told = json.loads(sys.argv[1])
    order = ArmOrder(**{**told, "shape": Shape(**told["shape"])})
    torch.set_num_threads(order.threads)
    KINDS[order.kind](order)
