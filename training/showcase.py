"""The sample adapters that ship with the embedded base: made, measured and described here.

The card beside each is written from its evaluation, never by hand.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapters.template import render_chat
from base.load import Base
from training import checkpoint
from training.config import DataConfig, MethodConfig, OptimConfig, TrainConfig
from training.data import Example, examples
from training.evaluate import ExactMatch, exact_match
from training.methods import Attached, attach
from training.recipe import Step, Trained, train
from training.tasks import TASKS, Item, Task

SAMPLES = Path(__file__).parent / "samples"
TEST_ITEMS = 500
SHOTS = 6
MAX_NEW_TOKENS = 56  # no answer is longer


@dataclass(frozen=True, slots=True)
class Sample:
    """One shipped adapter: its task and how it is trained."""

    name: str
    task: str
    method: MethodConfig
    optim: OptimConfig
    train_items: int

    def config(self, base: str) -> TrainConfig:
        """The run, as `nibble train data` and `nibble train run` would be told."""
        return TrainConfig(
            base=base,
            data=DataConfig(train=Path(f"{self.task}/train.jsonl")),
            method=self.method,
            optim=self.optim,
            out=SAMPLES / self.name,
        )


SHIPPED = (
    Sample(
        name="cipher",
        task="cipher",
        method=MethodConfig(kind="lora", rank=8, alpha=16),
        optim=OptimConfig(learning_rate=4e-3, steps=600, batch_size=16),
        train_items=8000,
    ),
    Sample(
        name="tickets",
        task="tickets",
        method=MethodConfig(kind="dora", rank=8, alpha=16),
        optim=OptimConfig(learning_rate=4e-3, steps=300, batch_size=16),
        train_items=4000,
    ),
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of asking for the same held-out answers."""

    name: str
    score: ExactMatch


def make_sample(
    base: Base,
    sample: Sample,
    out: Path,
    trained: Callable[[Step], None],
    evaluated: Callable[[str, int], None],
) -> list[Arm]:
    """Train, save, load what was saved, measure it beside the base, write the card.

    `evaluated` hears the arm's name and how many of its items are done.
    """
    task = TASKS[sample.task]
    config = sample.config("mini")
    data = task_examples(base, task.items("train", sample.train_items), config.data.max_length)
    torch.manual_seed(config.seed)
    adapter = attach(base, config)
    run = train(base, adapter, data, (), config, trained)
    adapter.save(out)
    adapter.detach()

    items = task.items("test", TEST_ITEMS)
    arms = [
        measure(base, "base without adapter", items, (), evaluated),
        measure(base, f"base, {SHOTS} examples as turns", items, shots(task), evaluated),
    ]
    adapter = checkpoint.load(out, base)
    arms.append(measure(base, "base with this adapter", items, (), evaluated, adapter))
    adapter.detach()
    write_card(out, base, sample, run, arms)
    return arms


def task_examples(base: Base, items: Sequence[Item], max_length: int) -> list[Example]:
    rows = ((f"item {number}", item.row) for number, item in enumerate(items))
    return examples(rows, base.tokenizer, max_length)


def shots(task: Task) -> list[Item]:
    """The examples of the few-shot prompt, from the training split."""
    return task.items("train", SHOTS, seed=1)


def measure(
    base: Base,
    name: str,
    items: Sequence[Item],
    shown: Sequence[Item],
    evaluated: Callable[[str, int], None],
    adapter: Attached | None = None,
) -> Arm:
    """Exact match on `items`, with the answered examples `shown` before each question."""
    lead = [message for item in shown for message in item.messages]
    prompts = [render_chat(base.tokenizer, [*lead, item.messages[0]]) for item in items]
    score = exact_match(
        base,
        prompts,
        [item.answer for item in items],
        max_new_tokens=MAX_NEW_TOKENS,
        adapter=adapter,
        report=lambda done: evaluated(name, done),
    )
    return Arm(name, score)


def write_card(out: Path, base: Base, sample: Sample, run: Trained, arms: Sequence[Arm]) -> None:
    """evaluation.json, and README.md made from it."""
    evaluation = _evaluation(base, sample, run, arms)
    text = json.dumps(evaluation, indent=2, ensure_ascii=False)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(evaluation), encoding="utf-8")


def _evaluation(base: Base, sample: Sample, run: Trained, arms: Sequence[Arm]) -> dict[str, Any]:
    task = TASKS[sample.task]
    return {
        "name": sample.name,
        "task": task.name,
        "title": task.title,
        "about": task.about,
        "base": {"id": base.spec.id, "fingerprint": base.spec.fingerprint},
        "method": sample.method.model_dump(mode="json"),
        "optim": sample.optim.model_dump(mode="json"),
        "train_items": sample.train_items,
        "train": {key: _round(value) for key, value in asdict(run).items()},
        "test_items": TEST_ITEMS,
        "exact_match": [
            {
                "arm": arm.name,
                "right": arm.score.right,
                "rate": _round(arm.score.rate),
                "interval": [_round(edge) for edge in arm.score.interval],
            }
            for arm in arms
        ],
        "example": task.items("test", 1, seed=2)[0].messages,
        "command": "nibble train samples",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": _machine(base),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def card(evaluation: dict[str, Any]) -> str:
    """The model card of one sample, in Markdown."""
    method, optim, run = evaluation["method"], evaluation["optim"], evaluation["train"]
    question, answer = (message["content"] for message in evaluation["example"])
    versions = ", ".join(f"{name} {number}" for name, number in evaluation["versions"].items())
    rows = "\n".join(
        f"| {row['arm']} | {row['rate']:.1%} | {row['interval'][0]:.1%} to "
        f"{row['interval'][1]:.1%} |"
        for row in evaluation["exact_match"]
    )
    return f"""# {evaluation["title"]}

{evaluation["about"]}

> {question}
>
> {answer}

Exact match on {evaluation["test_items"]} held-out questions, greedy, over the NF4 base:

| | exact match | 95 % interval |
|---|---|---|
{rows}

- Base: `{evaluation["base"]["id"]}`, fingerprint `{evaluation["base"]["fingerprint"][:16]}…`
- Method: {method["kind"]}, rank {method["rank"]}, alpha {method["alpha"]}, targets \
{", ".join(method["targets"])}; {run["parameters"]:,} trained parameters, fp32
- Training: {evaluation["train_items"]:,} questions made from a seed, {optim["steps"]} steps of \
{optim["batch_size"]}, rate {optim["learning_rate"]:g}; {run["tokens"]:,} tokens in \
{run["seconds"]:.0f} s; loss at the end {run["loss"]:.4f}
- Made by `{evaluation["command"]}` on {evaluation["date"]}: {evaluation["machine"]}; {versions}
"""


def _round(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _machine(base: Base) -> str:
    if base.device.type == "cuda":
        return torch.cuda.get_device_name(base.device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
