"""One arm of a study, in a process of its own: what it runs, measures, and leaves on the disk."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from base.load import Base, load_base, load_float
from base.mini import MINI
from training import checkpoint
from training.config import DataConfig, OptimConfig, TrainConfig
from training.data import Example, examples, read_rows
from training.errors import MethodError
from training.evaluation.likelihood import Likelihood, choose, likelihoods
from training.methods import Attached, attach, full
from training.methods.files import WEIGHTS
from training.recipe import Step, train
from training.study.config import Reference, StudyConfig, TaskConfig
from training.study.material import Material
from training.study.place import Place
from training.study.prompts import Prompts
from training.study.questions import Found
from training.study.retrieved import found_by
from training.tasks import Item

Kind = Literal["reference", "trial", "final", "shuffled_labels", "zero_steps", "other_task"]
OTHERS = 200  # items of each other task that an adapter is asked
COMPARED = 16  # items on which zero steps are compared with the base
CURVE = 50  # points of a learning curve


@dataclass(frozen=True, slots=True)
class Arm:
    """What to run. Its id is its file's name, so it says all that tells arms apart."""

    kind: Kind
    task: str
    name: str  # the method's label, or the reference's
    learning_rate: float = 0.0
    seed: int = 0

    @property
    def id(self) -> str:
        if self.kind == "reference":
            return f"{self.task}.{self.name}"
        end = f".lr{self.learning_rate:g}" if self.kind == "trial" else ""
        middle = "" if self.kind in ("trial", "final") else f".{self.kind}"
        return f"{self.task}.{self.name}{middle}{end}.s{self.seed}"


def run_arm(study: StudyConfig, place: Place, arm: Arm) -> dict[str, Any]:
    """Run the arm in this process. What it returns is JSON."""
    torch.set_num_threads(study.threads)
    task = study.task(arm.task)
    base = _base(study, place, arm)
    work = _Work(study, place, arm, base, task, Material.read(place.material(arm.task)))
    started = time.perf_counter()
    found: dict[str, Any] = {
        "reference": work.reference,
        "trial": work.trial,
        "final": work.final,
        "shuffled_labels": work.shuffled,
        "zero_steps": work.zero_steps,
        "other_task": work.other_tasks,
    }[arm.kind]()
    return {
        "arm": {**asdict(arm), "id": arm.id},
        "metric": task.metric,
        **found,
        "wall_seconds": round(time.perf_counter() - started, 2),
        "started_bytes": work.started_bytes,
        "peak_bytes": found.get("peak_bytes", peak_bytes(base)),
    }


def _base(study: StudyConfig, place: Place, arm: Arm) -> Base:
    """NF4, as it is served; for full fine-tuning in floating point, and what a trial made of it."""
    source = MINI if study.base == "mini" else study.base
    if arm.kind == "reference" or not is_full(study, arm):
        double = study.double_quant
        return load_base(source, dtype="auto", device="auto", double_quant=double)
    kept = place.adapter(arm.task, arm.name, arm.learning_rate, arm.seed)
    trained = arm.kind == "final" and place.result(replace(arm, kind="trial").id).is_file()
    return load_float(kept if trained else source, device="auto")


def is_full(study: StudyConfig, arm: Arm) -> bool:
    """Does the arm make a new base rather than an adapter?"""
    return arm.kind != "reference" and study.arm(arm.name).method.kind == "full"


class _Work:
    """One arm with its base in memory."""

    def __init__(
        self,
        study: StudyConfig,
        place: Place,
        arm: Arm,
        base: Base,
        task: TaskConfig,
        material: Material,
    ) -> None:
        self.study, self.place, self.arm = study, place, arm
        self.base, self.task, self.material = base, task, material
        self.started_bytes = peak_bytes(base)

    def reference(self) -> dict[str, Any]:
        style: Reference = self.arm.name  # type: ignore[assignment]
        passages = found_by(style, self.place.material(self.task.name))
        found: dict[str, Any] = {"test": self.scores(self.material.test, None, style, passages)}
        if style == "zero_shot":
            found["retention"] = self.retention()
        return found

    def trial(self) -> dict[str, Any]:
        """Train, keep the adapter, and see the validation items; never the test items."""
        adapter, trained = self._train(self._rows(self.material.train))
        trained["validation_nats"] = self._validation(adapter)
        return trained

    def final(self) -> dict[str, Any]:
        """The chosen rate on the test items; the trial of the same seed has trained it already."""
        trial = self.place.result(replace(self.arm, kind="trial").id)
        adapter: Attached | None
        if trial.is_file():
            adapter, trained = self._kept(), of_training(trial)
        else:
            adapter, trained = self._train(self._rows(self.material.train))
            trained["validation_nats"] = self._validation(adapter)
        return {
            **trained,
            "test": self.scores(self.material.test, adapter),
            "retention": self.retention(adapter),
        }

    def shuffled(self) -> dict[str, Any]:
        """The same with every question's answer another's: what is learnt must be chance."""
        adapter, trained = self._train(self._rows(shuffled(self.material.train, self.arm.seed)))
        return {
            **trained,
            "test": self.scores(self.material.test, adapter),
            "chance": chance(self.task, self.material),
        }

    def zero_steps(self) -> dict[str, Any]:
        """Are the logits of a fresh adapter, saved and loaded, the base's own to the bit?"""
        prompts = Prompts(self.base, self.task, self.material)
        rows = [prompts.example(item) for item in self.material.test[:COMPARED]]
        plain = [_logits(self.base, row, None) for row in rows]
        torch.manual_seed(self.arm.seed)
        adapter = attach(self.base, self._config)
        adapter.save(self._folder)
        adapter.detach()
        adapter = checkpoint.load(self._folder, self.base)
        fresh = [_logits(self.base, row, adapter) for row in rows]
        far = max(float((a - b).abs().max()) for a, b in zip(plain, fresh, strict=True))
        same = all(torch.equal(a, b) for a, b in zip(plain, fresh, strict=True))
        return {"bitwise": same, "largest_difference": far, "items": len(rows)}

    def other_tasks(self) -> dict[str, Any]:
        """This task's adapter, asked the others' questions."""
        adapter = checkpoint.load(self._folder, self.base)
        found = {}
        for other in self.study.tasks:
            if other.name == self.task.name:
                continue
            work = replace_task(self, other)
            found[other.name] = work.scores(work.material.test[:OTHERS], adapter)
        return {"others": found}

    def _kept(self) -> Attached | None:
        """The adapter that was trained; of full fine-tuning the base itself is (`_base`)."""
        whole = is_full(self.study, self.arm)
        return None if whole else checkpoint.load(self._folder, self.base)

    @property
    def _folder(self) -> Path:
        arm = self.arm
        name = (
            arm.name if arm.kind in ("trial", "final", "other_task") else f"{arm.name}.{arm.kind}"
        )
        return self.place.adapter(arm.task, name, arm.learning_rate, arm.seed)

    @property
    def _weights(self) -> str:
        return full.WEIGHTS if is_full(self.study, self.arm) else WEIGHTS

    @property
    def _config(self) -> TrainConfig:
        return TrainConfig(
            base=self.study.base,
            double_quant=self.study.double_quant,
            data=DataConfig(
                train=self.place.material(self.task.name) / "train.jsonl",
                max_length=self.task.max_length,
            ),
            method=self.study.arm(self.arm.name).method,
            optim=OptimConfig(
                learning_rate=self.arm.learning_rate or 1e-3,
                batch_size=self.task.batch_size or self.study.batch_size,
                warmup=self.study.warmup,
            ),
            seed=self.arm.seed,
            out=self._folder,
        )

    def _rows(self, items: Sequence[Item]) -> list[Example]:
        rows = ((f"item {number}", item.row) for number, item in enumerate(items))
        return examples(rows, self.base.tokenizer, self.task.max_length)

    def _train(self, data: Sequence[Example]) -> tuple[Attached, dict[str, Any]]:
        """As many steps as make the study's tokens on average: the same batches for each method."""
        mean = sum(len(example.tokens) for example in data) / len(data)
        size = min(self.task.batch_size or self.study.batch_size, len(data))
        steps = max(1, round((self.task.tokens or self.study.tokens) / (size * mean)))
        config = self._config
        config = config.model_copy(
            update={"optim": config.optim.model_copy(update={"steps": steps})}
        )
        torch.manual_seed(config.seed)
        adapter = attach(self.base, config)
        seen: list[Step] = []
        run = train(self.base, adapter, data, (), config, seen.append)
        peak = peak_bytes(self.base)
        adapter.save(config.out)
        return adapter, {
            "steps": run.steps,
            "tokens": run.tokens,
            "train_seconds": round(run.seconds, 2),
            "tokens_per_second": round(run.tokens / run.seconds, 1),
            "parameters": run.parameters,
            "loss": round(run.loss, 5),
            "curve": curve(seen),
            "file_bytes": (config.out / self._weights).stat().st_size,
            "peak_bytes": peak,
        }

    def _validation(self, adapter: Attached) -> float:
        """Nats for each token of the right answers."""
        prompts = Prompts(self.base, self.task, self.material)
        rows = [prompts.example(item) for item in self.material.validation]
        found = likelihoods(self.base, rows, adapter=adapter)
        return round(sum(one.nats for one in found) / sum(one.tokens for one in found), 5)

    def scores(
        self,
        items: Sequence[Item],
        adapter: Attached | None = None,
        style: Reference = "zero_shot",
        passages: Found | None = None,
    ) -> dict[str, Any]:
        """Of each item: right or wrong by the metric, nats and tokens of the right answer."""
        prompts = Prompts(self.base, self.task, self.material, style, passages)
        found = likelihoods(self.base, [prompts.example(i) for i in items], adapter=adapter)
        scores: dict[str, Any] = {
            "nats": [round(one.nats, 4) for one in found],
            "tokens": [one.tokens for one in found],
        }
        if self.task.metric == "accuracy":
            said = self._chosen(items, prompts, adapter)
            scores["said"] = said
            scores["right"] = [int(i.answer == a) for i, a in zip(items, said, strict=True)]
        elif self.task.metric == "exact_match":
            scores["right"] = [int(one.exact) for one in found]
        return scores

    def _chosen(
        self, items: Sequence[Item], prompts: Prompts, adapter: Attached | None
    ) -> list[str]:
        """The most likely of each item's choices."""
        rows = [prompts.example(item, choice) for item in items for choice in item.choices]
        found = iter(likelihoods(self.base, rows, adapter=adapter))
        each: list[list[Likelihood]] = [[next(found) for _ in item.choices] for item in items]
        return [item.choices[i] for item, i in zip(items, choose(each), strict=True)]

    def retention(self, adapter: Attached | None = None) -> list[int] | None:
        """Of each thing that the base knows: is it still said?"""
        if not self.place.retention.is_file():
            return None
        rows = examples(read_rows(self.place.retention), self.base.tokenizer, 1024)
        return [int(one.exact) for one in likelihoods(self.base, rows, adapter=adapter)]


def of_training(result: Path) -> dict[str, Any]:
    """What a trial's result says of its training, its peak memory with it."""
    found = json.loads(result.read_text(encoding="utf-8"))
    apart = ("arm", "metric", "wall_seconds", "started_bytes")
    return {key: value for key, value in found.items() if key not in apart}


def replace_task(work: _Work, other: TaskConfig) -> _Work:
    """The same arm with another task's questions."""
    arm = replace(work.arm, task=other.name)
    material = Material.read(work.place.material(other.name))
    return _Work(work.study, work.place, arm, work.base, other, material)


@torch.no_grad()
def _logits(base: Base, row: Example, adapter: Attached | None) -> torch.Tensor:
    tokens = torch.tensor([row.tokens], device=base.device)
    run = base.model if adapter is None else adapter.forward
    logits: torch.Tensor = run(input_ids=tokens, use_cache=False).logits
    return logits


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The same questions and the same answers, dealt anew; of documents, the words."""
    dealer = random.Random(f"shuffled {seed}")
    if not items[0].question:
        pages = [item.answer.split() for item in items]
        for words in pages:
            dealer.shuffle(words)
        return [
            replace(item, answer=" ".join(words)) for item, words in zip(items, pages, strict=True)
        ]
    # An answer goes to a question with the same choices, or it would give itself away.
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.choices, []).append(index)
    answers = [item.answer for item in items]
    for group in groups.values():
        dealt = [answers[i] for i in group]
        dealer.shuffle(dealt)
        for index, answer in zip(group, dealt, strict=True):
            answers[index] = answer
    return [replace(item, answer=a) for item, a in zip(items, answers, strict=True)]


def chance(task: TaskConfig, material: Material) -> float | None:
    """How often the most frequent answer is right: what can be had without reading a question."""
    if task.metric == "nats":
        return None
    if task.metric == "accuracy":
        shares: list[float] = []
        for item in material.test:
            same = [other for other in material.test if other.choices == item.choices]
            most = max(sum(o.answer == c for o in same) for c in item.choices)
            shares.append(most / len(same))
        return sum(shares) / len(shares)
    answers = [item.answer for item in material.test]
    return max(map(answers.count, set(answers))) / len(answers)


def curve(steps: Sequence[Step]) -> list[list[float]]:
    """[tokens, loss] of at most CURVE stretches of a run, each its mean."""
    width = max(1, -(-len(steps) // CURVE))
    points = []
    for start in range(0, len(steps), width):
        part = steps[start : start + width]
        mean = sum(step.loss for step in part) / len(part)
        points.append([part[-1].tokens, round(mean, 5)])
    return points


def peak_bytes(base: Base) -> int:
    """The most memory so far, of the device or of the process; ru_maxrss counts KiB on Linux."""
    if base.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(base.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def refused(arm: Arm, error: Exception) -> dict[str, Any]:
    """An arm that cannot run on this base says why, and the study goes on."""
    assert isinstance(error, MethodError)
    return {"arm": {**asdict(arm), "id": arm.id}, "refused": str(error)}
