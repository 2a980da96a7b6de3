"""StudyConfig: what is compared, on what, with which budget. The YAML file is this schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.config import AnyMethod
from training.errors import ConfigError
from training.tasks import TASKS

Metric = Literal["exact_match", "accuracy", "nats"]
Reference = Literal["zero_shot", "few_shot", "gold_context", "bm25", "template", "dense", "hybrid"]
Control = Literal["shuffled_labels", "zero_steps", "other_task"]
NAME = r"^[a-z0-9][a-z0-9_.+-]{0,39}$"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TableConfig(_Frozen):
    """Labelled texts: a column is the text, another the label; `choices` says labels in words."""

    train: Path
    test: Path | None = Field(default=None, description="without it, a part of train by its hash")
    text: str = Field(min_length=1, description="the text's column")
    label: str = Field(min_length=1, description="the label's column")
    choices: dict[str, str] = Field(min_length=2, description="label -> what the model is to say")
    question: str = Field(description="what is asked; {text} is where the text goes")
    quotes: bool = Field(
        default=True, description="false: a quotation mark in a .tsv is one, as in NSMC's files"
    )

    @model_validator(mode="after")
    def _asks_about_the_text(self) -> Self:
        if "{text}" not in self.question:
            raise ValueError("question: {text} is missing, where the text goes")
        if len(set(self.choices.values())) < len(self.choices):
            raise ValueError("choices: two labels are said in the same words")
        return self


class TaskConfig(_Frozen):
    """One task: an invented one by its name, or a table of labelled texts."""

    name: str = Field(pattern=NAME)
    metric: Metric
    task: str | None = Field(default=None, description="one of `nibble train data`; default: name")
    table: TableConfig | None = None
    train_items: int = Field(default=3000, ge=1, le=1_000_000)
    validation_items: int = Field(default=200, ge=1, le=10_000)
    test_items: int = Field(default=500, ge=1, le=100_000)
    max_length: int = Field(default=512, ge=2, le=1 << 20)
    tokens: int | None = Field(default=None, ge=1, description="of this task, for every method")
    batch_size: int | None = Field(default=None, ge=1, le=4096)
    shots: int = Field(default=6, ge=1, le=100, description="examples of the few-shot prompt")
    passages: int = Field(default=4, ge=1, le=100, description="that retrieval puts in a prompt")
    template: Path | None = Field(
        default=None, description="a prompt template (.yaml) for the reference `template`"
    )

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.table is None and self.source not in TASKS:
            raise ValueError(f"task {self.source!r}: one of {', '.join(TASKS)}, or a table")
        if self.table is not None and self.metric != "accuracy":
            raise ValueError("a table of labels is measured by accuracy")
        return self

    @property
    def source(self) -> str:
        return self.task or self.name


class ArmConfig(_Frozen):
    """One method and the learning rates that are tried for it, by the validation loss."""

    method: AnyMethod
    name: str | None = Field(default=None, pattern=NAME, description="default: the method's kind")
    learning_rates: tuple[float, ...] = Field(min_length=1, max_length=20)

    @property
    def label(self) -> str:
        return self.name or str(self.method.kind)


class HypothesisConfig(_Frozen):
    """Written down before: `method`'s lower bound is above `over` on `at_least` tasks."""

    method: str
    over: str
    at_least: int = Field(ge=1, description="tasks")


class StudyConfig(_Frozen):
    """Methods × learning rates × seeds, each with the same tokens and the same number of trials."""

    name: str = Field(min_length=1, max_length=200)
    base: str = Field(default="mini", description="the embedded base, a directory, or a hub id")
    double_quant: bool | None = Field(default=None, description="of the base, as for a run")
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    methods: tuple[ArmConfig, ...] = Field(min_length=1)
    references: tuple[Reference, ...] = ("zero_shot", "few_shot", "gold_context", "bm25")
    controls: tuple[Control, ...] = ("shuffled_labels", "zero_steps", "other_task")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, max_length=100)
    tokens: int = Field(ge=1, description="that one trained arm sees, prompts included")
    batch_size: int = Field(default=16, ge=1, le=4096)
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    retention: Path | None = Field(
        default=None,
        description="rows that the base knows, to see what is forgotten; mini brings its own",
    )
    hypothesis: HypothesisConfig | None = None
    threads: int = Field(default=1, ge=1, le=1024, description="of each arm's process")
    serving: bool = Field(default=True, description="time each kept adapter on a server")

    @model_validator(mode="after")
    def _is_fair(self) -> Self:
        tried = {arm.label: len(arm.learning_rates) for arm in self.methods}
        if len(tried) < len(self.methods):
            raise ValueError("methods: two have the same name; give one a `name` of its own")
        if len(set(tried.values())) > 1:
            raise ValueError(f"methods: every one gets as many learning rates as another: {tried}")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: two have the same name: {names}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}: one is there twice")
        self._check_hypothesis(set(tried), names)
        self._check_templates()
        return self

    def _check_templates(self) -> None:
        for task in self.tasks if "template" in self.references else ():
            if task.template is None:
                raise ValueError(
                    f"task {task.name}: the reference `template` needs a `template`, a YAML file"
                )
            if task.metric == "nats":
                raise ValueError(f"task {task.name}: a document is not asked through a template")

    def _check_hypothesis(self, methods: set[str], tasks: list[str]) -> None:
        said = self.hypothesis
        if said is None:
            return
        if said.method not in methods:
            raise ValueError(f"hypothesis.method {said.method!r} is none of {sorted(methods)}")
        if said.over not in {*methods, *self.references}:
            raise ValueError(f"hypothesis.over {said.over!r} is no arm of this study")
        if said.at_least > len(tasks):
            raise ValueError(
                f"hypothesis.at_least is {said.at_least}, and there are {len(tasks)} tasks"
            )

    def task(self, name: str) -> TaskConfig:
        return next(task for task in self.tasks if task.name == name)

    def arm(self, label: str) -> ArmConfig:
        return next(arm for arm in self.methods if arm.label == label)


def read_study(path: Path) -> StudyConfig:
    """The study at `path`; paths in it are relative to its folder. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a mapping is needed")
    _anchor(values, path.resolve().parent)
    try:
        return StudyConfig.model_validate(values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _anchor(values: dict[str, Any], folder: Path) -> None:
    """Paths of files in the study, seen from the study's own folder."""
    if isinstance(values.get("retention"), str):
        values["retention"] = folder / values["retention"]
    for task in values.get("tasks") or ():
        if isinstance(task, dict) and isinstance(task.get("template"), str):
            task["template"] = folder / task["template"]
        table = task.get("table") if isinstance(task, dict) else None
        for key in ("train", "test"):
            if isinstance(table, dict) and isinstance(table.get(key), str):
                table[key] = folder / table[key]
