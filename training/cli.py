"""`nibble train`: make adapters and measure them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from base.errors import UnservableBase
from base.hub import locate
from base.load import Base, load_base
from base.mini import MINI
from training import checkpoint, showcase
from training.config import TrainConfig, assignments, read_config
from training.data import Example, Prepared, examples, prepare, read_rows, survey
from training.data.report import SHOWN
from training.errors import TrainingError
from training.evaluate import exact_match
from training.interrupts import interrupts
from training.methods import METHODS, attach
from training.plan import described, highlighted, make_plan
from training.recipe import Step, Trained, train
from training.run_directory import RunDirectory
from training.tasks import TASKS

TEMPLATE_FILE = "chat_template.jinja"  # beside an adapter; `nibble adapters push` sends it along
FILES = ".jsonl, .json, .csv, .tsv, .parquet, a folder of one of these, or a saved dataset."
app = typer.Typer(help="Train adapters over the NF4 base and measure them.", no_args_is_help=True)
console = Console()

BaseOption = Annotated[
    str | None, typer.Option("--base", help="mini, a directory, or a hub id.", show_default="mini")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of the schema: --set eval.every=50; may be repeated."),
]


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="YAML; flags win over it.")] = None,
    base: BaseOption = None,
    data: Annotated[Path | None, typer.Option(help=f"To learn from: {FILES}")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval", help="The same, held out.")] = None,
    method: Annotated[str | None, typer.Option(help=", ".join(METHODS))] = None,
    rank: Annotated[int | None, typer.Option()] = None,
    alpha: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Where the adapter goes.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train one adapter and write it in PEFT's format.

    Ctrl-C ends after the running step and leaves the adapter and a checkpoint.
    """
    with _refusals():
        flags = _flags(locals())
        _run(read_config(config, {**flags, **assignments(settings or [])}), resume)


def _run(config: TrainConfig, resume: bool) -> None:
    directory = RunDirectory(config.out)
    state = directory.resume(config) if resume else None
    base = _load(config.base)
    found = prepare(config.data, base.tokenizer)
    _say_what_is_wrong(found)
    torch.manual_seed(config.seed)
    adapter = attach(base, config)
    if state is None:
        directory.begin(config)
    with _progress() as progress, interrupts() as asked:
        bar = _bar(progress, "train", config)

        def report(step: Step) -> None:
            directory.note(step)
            bar(step)

        done = train(
            base,
            adapter,
            found.train,
            found.held_out,
            config,
            report,
            resume=state,
            keep=lambda kept: directory.keep(config, kept),
            asked_to_stop=asked,
        )
    adapter.save(config.out)
    _save_template(config.out, found.template)
    console.print(_outcome(config, done))
    if done.ended == "asked":
        raise typer.Exit(130)


def _outcome(config: TrainConfig, done: Trained) -> str:
    evaluation = "" if done.eval_loss is None else f", held out {done.eval_loss:.4f}"
    if done.best_step is not None:
        evaluation += f" (the weights of step {done.best_step:,})"
    why = {
        "asked": f"stopped at step {done.steps:,}: go on with --resume. ",
        "patience": f"ended at step {done.steps:,}: the held-out loss no longer falls. ",
        "minutes": f"ended at step {done.steps:,}: the minutes are used up. ",
        "tokens": f"ended at step {done.steps:,}: the tokens are used up. ",
    }.get(done.ended, "")
    return (
        f"{why}{config.out}: {done.parameters:,} parameters, {done.tokens:,} tokens in "
        f"{done.seconds:.0f} s ({done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s), "
        f"loss {done.loss:.4f}{evaluation}"
    )


@app.command(name="plan")
def show_plan(
    config: Annotated[Path | None, typer.Argument(help="YAML; flags win over it.")] = None,
    base: BaseOption = None,
    data: Annotated[Path | None, typer.Option(help=f"To learn from: {FILES}")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval", help="The same, held out.")] = None,
    method: Annotated[str | None, typer.Option(help=", ".join(METHODS))] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    settings: Settings = None,
) -> None:
    """Say what a run would do, cost and learn from, after three trial steps; nothing is written."""
    with _refusals():
        found = read_config(config, {**_flags(locals()), **assignments(settings or [])})
        model = _load(found.base)
        prepared = prepare(found.data, model.tokenizer)
        torch.manual_seed(found.seed)
        plan = make_plan(model, prepared.train, found)
        console.print(described(plan, found, model.tokenizer), *prepared.described())
    if plan.too_large:
        raise typer.Exit(1)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help=FILES)],
    config: Annotated[Path | None, typer.Option(help="YAML, for its data and base.")] = None,
    base: BaseOption = None,
    shown: Annotated[int, typer.Option(min=0, help="Bad and cut rows to name.")] = SHOWN,
    settings: Settings = None,
) -> None:
    """Report on data: its lengths, what is too long, and each bad row by line and field.

    Ends with 1 where a run would refuse it. Of the base only the tokenizer is loaded.
    """
    with _refusals():
        flags = {"data.train": data, "base": base, **assignments(settings or [])}
        found = read_config(config, flags)
        tokenizer = _tokenizer(found.base)
        prepared = survey(found.data, tokenizer, shown)
        console.print(*prepared.described())
        if prepared.train:
            console.print(highlighted(prepared.train[0], tokenizer))
    if not prepared.train or any(r.bad > found.data.max_bad_rows for r in prepared.reports):
        raise typer.Exit(1)


_FLAGS = {
    "base": "base",
    "data": "data.train",
    "eval_data": "data.eval",
    "method": "method.kind",
    "rank": "method.rank",
    "alpha": "method.alpha",
    "learning_rate": "optim.learning_rate",
    "steps": "optim.steps",
    "batch_size": "optim.batch_size",
    "seed": "seed",
    "out": "out",
}


def _flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """The command's flags by the fields of the schema that they set."""
    return {field: given[flag] for flag, field in _FLAGS.items() if flag in given}


@app.command(name="eval")
def evaluate(
    data: Annotated[Path, typer.Argument(help=f"The right answers: {FILES}")],
    adapter: Annotated[Path | None, typer.Option(help="A directory; without it the base.")] = None,
    base: BaseOption = None,
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    batch_size: Annotated[int, typer.Option()] = 64,
    max_length: Annotated[int, typer.Option()] = 1024,
) -> None:
    """Exact match by greedy generation: each answer of the data against what the model says."""
    with _refusals():
        model = _load(base or "mini")
        template = adapter / TEMPLATE_FILE if adapter else None
        own = template.read_text("utf-8") if template and template.is_file() else None
        items = examples(read_rows(data), model.tokenizer, max_length, own)
        attached = checkpoint.load(adapter, model) if adapter else None
        with _progress() as progress:
            bar = progress.add_task("eval", total=len(items))
            score = exact_match(
                model,
                [item.tokens[: item.answer_start] for item in items],
                [_answer(model, item) for item in items],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                adapter=attached,
                report=lambda done: progress.update(bar, completed=done),
            )
    low, high = score.interval
    console.print(
        f"exact match {score.rate:.1%} ({score.right} of {score.total}), "
        f"95 % interval {low:.1%} to {high:.1%}"
    )


@app.command(name="data")
def write_data(
    task: Annotated[str, typer.Argument(help=", ".join(TASKS))],
    out: Annotated[Path, typer.Option(help="Directory for train.jsonl and test.jsonl.")],
    train_items: Annotated[int, typer.Option(min=1)] = 4000,
    test_items: Annotated[int, typer.Option(min=1)] = 500,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write one of the invented tasks as JSON Lines."""
    if task not in TASKS:
        _refuse(f"task {task!r}: one of {', '.join(TASKS)} is needed")
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_items), ("test", test_items)):
        items = TASKS[task].items("train" if split == "train" else "test", count, seed)
        lines = [json.dumps(item.row, ensure_ascii=False) for item in items]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        console.print(f"{out / split}.jsonl: {count:,} items")


@app.command()
def samples(
    out: Annotated[Path, typer.Option(help="Each adapter in its own folder.")] = showcase.SAMPLES,
    base: BaseOption = None,
) -> None:
    """Train, measure and describe the sample adapters that ship with the embedded base."""
    with _refusals():
        model = _load(base or "mini")
        for sample in showcase.SHIPPED:
            _sample(model, sample, out / sample.name)


def _sample(base: Base, sample: showcase.Sample, out: Path) -> None:
    with _progress() as progress:
        bars: dict[str, TaskID] = {}

        def evaluated(arm: str, done: int) -> None:
            if arm not in bars:
                bars[arm] = progress.add_task(arm, total=showcase.TEST_ITEMS)
            progress.update(bars[arm], completed=done)

        trained = _bar(progress, sample.name, sample.config("mini"))
        arms = showcase.make_sample(base, sample, out, trained, evaluated)
    table = Table("exact match", str(out))
    for arm in arms:
        table.add_row(arm.name, f"{arm.score.rate:.1%}")
    console.print(table)


def _load(source: str) -> Base:
    """In fp32 on a CPU, in what the device computes best elsewhere."""
    dtype = "auto" if torch.cuda.is_available() else "float32"
    return load_base(MINI if source == "mini" else source, dtype=dtype)


def _tokenizer(source: str) -> Any:
    """The base's tokenizer alone."""
    found = locate(str(MINI) if source == "mini" else source, None)
    try:
        return AutoTokenizer.from_pretrained(
            found.directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer class fails in its own way
        raise UnservableBase(f"the tokenizer cannot be loaded: {error}") from error


def _save_template(out: Path, template: str | None) -> None:
    """What the adapter was trained with goes beside it; an earlier run's template must not stay."""
    if template is None:
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        (out / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _say_what_is_wrong(found: Prepared) -> None:
    """What a run that goes on all the same must not pass over in silence."""
    for report in found.reports:
        if said := report.summary():
            console.print(Text(f"{report.path}: {said}; see nibble train check", style="yellow"))


def _answer(base: Base, item: Example) -> str:
    text: str = base.tokenizer.decode(item.tokens[item.answer_start :], skip_special_tokens=True)
    return text


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _bar(progress: Progress, name: str, config: TrainConfig) -> Any:
    bar = progress.add_task(name, total=config.optim.steps)

    def report(step: Step) -> None:
        progress.update(bar, completed=step.number, description=f"{name}  loss {step.loss:.4f}")

    return report


@contextmanager
def _refusals() -> Iterator[None]:
    """What the user can put right ends in one line, not in a traceback."""
    try:
        yield
    except (TrainingError, UnservableBase) as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]refused:[/] {escape(message)}", highlight=False)
    raise typer.Exit(2)
