"""`nibble train`: make adapters and measure them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
import yaml  # type: ignore[import-untyped]
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from base.errors import UnservableBase
from base.hub import locate
from base.mini import MINI
from training.config import AnyMethod, assignments, read_config
from training.errors import TrainingError
from training.tasks import TASKS
from training.terminal import DoubleQuant, bar, console, print_json, progress, quiet, refusals

if TYPE_CHECKING:  # each command imports what it needs: PEFT takes seconds, and few need it
    from base.load import Base
    from training import showcase
    from training.config import DataConfig
    from training.data import Example, Prepared

FILES = ".jsonl, .json, .csv, .tsv, .parquet, a folder of one of these, or a saved dataset."
SAMPLES = Path(__file__).with_name("samples")
METHODS = [
    kind
    for one in get_args(get_args(AnyMethod)[0])
    for kind in get_args(one.model_fields["kind"].annotation)
]
app = typer.Typer(help="Train adapters over the NF4 base and measure them.", no_args_is_help=True)

BaseOption = Annotated[
    str | None, typer.Option("--base", help="mini, a directory, or a hub id.", show_default="mini")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of the schema: --set eval.every=50; may be repeated."),
]


Steps = Annotated[int | None, typer.Option(help="Updates.", show_default="300")]
Epochs = Annotated[
    float | None, typer.Option(help="Times that the data is seen, in place of --steps.")
]
Rows = Annotated[
    int | None, typer.Option("--batch-size", help="Rows of a step.", show_default="16")
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="YAML; flags win over it.")] = None,
    base: BaseOption = None,
    data: Annotated[Path | None, typer.Option(help=f"To learn from: {FILES}")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval", help="The same, held out.")] = None,
    method: Annotated[str | None, typer.Option(help=", ".join(METHODS))] = None,
    rank: Annotated[int | None, typer.Option(help="Of low-rank methods.")] = None,
    alpha: Annotated[int | None, typer.Option(help="Scale: alpha over rank.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", show_default="0.002")] = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: Rows = None,
    seed: Annotated[int | None, typer.Option(show_default="0")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the adapter goes.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="The same where there is one; else begin.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where --out holds an earlier run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one adapter and write it in PEFT's format (method full: a new base).

    Ctrl-C ends after the running step and leaves the adapter and a checkpoint.
    """
    from training import session
    from training.distributed import leads

    with refusals(as_json), quiet(as_json):
        flags = _flags(locals())
        found = read_config(config, {**flags, **assignments(settings or [])})
        done = session.run(found, resume, go_on, overwrite)
    if as_json and leads():
        print_json({"out": found.out, **done.figures()})
    if done.ended == "asked":
        raise typer.Exit(130)


@app.command(name="plan")
def show_plan(
    config: Annotated[Path | None, typer.Argument(help="YAML; flags win over it.")] = None,
    base: BaseOption = None,
    data: Annotated[Path | None, typer.Option(help=f"To learn from: {FILES}")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval", help="The same, held out.")] = None,
    method: Annotated[str | None, typer.Option(help=", ".join(METHODS))] = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: Rows = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Say what a run would do, cost and learn from, after three trial steps; nothing is written."""
    import torch

    from training import session
    from training.data import prepare
    from training.plan import described, figures, make_plan
    from training.recipe import with_steps
    from training.weights import refuse_too_large

    with refusals(as_json):
        found = read_config(config, {**_flags(locals()), **assignments(settings or [])})
        refuse_too_large(found)
        found = session.resolved(found)
        model = session.load_for(found)
        prepared = prepare(found.data, model.tokenizer)
        found = with_steps(found, prepared.train)
        torch.manual_seed(found.seed)
        plan = make_plan(model, prepared.train, found)
        if as_json:
            said = {"config": found.model_dump(mode="json"), "data": prepared.counted()}
            print_json({**said, "plan": figures(plan, found, model.tokenizer)})
        else:
            console.print(described(plan, found, model.tokenizer), *prepared.described())
    if plan.too_large:
        raise typer.Exit(1)


@app.command(name="config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML; flags win over it.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Print a run's config with all its defaults, or what is wrong in it; no data is read."""
    with refusals(as_json):
        found = read_config(config, assignments(settings or [])).model_dump(mode="json")
    if as_json:
        print_json({"config": found})
    else:
        typer.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help=FILES)],
    config: Annotated[Path | None, typer.Option(help="YAML, for its data and base.")] = None,
    base: BaseOption = None,
    shown: Annotated[int, typer.Option(min=0, help="Bad and cut rows to name.")] = 20,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Report on data: its lengths, what is too long, and each bad row by line and field.

    Ends with 1 where a run would refuse it. Of the base only the tokenizer is loaded.
    """
    from training.data import survey
    from training.data.report import highlighted

    with refusals(as_json):
        flags = {"data.train": data, "base": base, **assignments(settings or [])}
        found = read_config(config, flags)
        tokenizer = _tokenizer(found.base)
        prepared = survey(found.data, tokenizer, shown)
        why = _refusal(prepared, found.data)
        if as_json:
            resolved = found.model_dump(mode="json")
            print_json({"config": resolved, "data": prepared.counted(), "refused": why})
        else:
            console.print(*prepared.described())
            if prepared.train:
                console.print(highlighted(prepared.train[0], tokenizer))
            if why:
                console.print(
                    f"[bold red]a run would refuse this:[/] {escape(why)}", soft_wrap=True
                )
    if why:
        raise typer.Exit(1)


def _refusal(found: Prepared, config: DataConfig) -> str | None:
    """Why a run would not take the data, in one line: the bad rows are named above it."""
    from training.data import refuse_unlearnable

    for report in found.reports:
        if report.bad > config.max_bad_rows:
            limit = f"data.max_bad_rows is {config.max_bad_rows}"
            return f"{report.path}: {report.bad:,} of {report.rows:,} rows are bad, {limit}"
    try:
        refuse_unlearnable(found, config)
    except TrainingError as error:
        return str(error)
    return None


_FLAGS = {
    "base": "base",
    "data": "data.train",
    "eval_data": "data.eval",
    "method": "method.kind",
    "rank": "method.rank",
    "alpha": "method.alpha",
    "learning_rate": "optim.learning_rate",
    "steps": "optim.steps",
    "epochs": "optim.epochs",
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
    double_quant: DoubleQuant = None,
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    batch_size: Annotated[int, typer.Option()] = 64,
    max_length: Annotated[int, typer.Option()] = 1024,
    as_json: Json = False,
) -> None:
    """Exact match by greedy generation: each answer of the data against what the model says."""
    from training import checkpoint, session
    from training.data import examples, read_rows
    from training.evaluate import exact_match

    with refusals(as_json):
        model = session.load(base or "mini", double_quant)
        template = adapter / session.TEMPLATE_FILE if adapter else None
        own = template.read_text("utf-8") if template and template.is_file() else None
        items = examples(read_rows(data), model.tokenizer, max_length, own)
        attached = checkpoint.load(adapter, model) if adapter else None
        with progress(not as_json) as shown:
            task = shown.add_task("eval", total=len(items))
            score = exact_match(
                model,
                [item.tokens[: item.answer_start] for item in items],
                [_answer(model, item) for item in items],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                adapter=attached,
                report=lambda done: shown.update(task, completed=done),
            )
    low, high = score.interval
    if as_json:
        counted = {"right": score.right, "total": score.total}
        print_json({"exact_match": score.rate, "interval": [low, high], **counted})
        return
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
    as_json: Json = False,
) -> None:
    """Write one of the invented tasks as JSON Lines."""
    with refusals(as_json):
        if task not in TASKS:
            raise TrainingError(f"task {task!r}: one of {', '.join(TASKS)} is needed")
    written = {}
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train_items), ("test", test_items)):
        items = TASKS[task].items("train" if split == "train" else "test", count, seed)
        lines = [json.dumps(item.row, ensure_ascii=False) for item in items]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        written[f"{out / split}.jsonl"] = count
    if as_json:
        print_json({"items": written})
        return
    for file, count in written.items():
        console.print(f"{file}: {count:,} items")


@app.command()
def samples(
    out: Annotated[Path, typer.Option(help="Each adapter in its own folder.")] = SAMPLES,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Train, measure and describe the sample adapters that ship with the embedded base."""
    from training import session, showcase

    with refusals(as_json), quiet(as_json):
        model = session.load(base or "mini")
        made = {
            sample.name: _sample(model, sample, out / sample.name) for sample in showcase.SHIPPED
        }
    if as_json:
        print_json({"out": str(out), "exact_match": made})


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="qwen2-0.4b (random weights), or a directory.")] = (
        "qwen2-0.4b"
    ),
    arms: Annotated[
        str, typer.Option(help="nibble, trainer, trainer-packed, nibble-dora, trainer-packed-dora.")
    ] = "nibble,trainer,trainer-packed",
    steps: Annotated[int, typer.Option(min=1, help="Counted; one more warms up.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Packed rows in a step.")] = 2,
    length: Annotated[int, typer.Option(min=16, max=32_768, help="Tokens in a row.")] = 512,
    rank: Annotated[int, typer.Option(min=1, max=256)] = 16,
    learning_rate: Annotated[float, typer.Option("--lr", min=0.0)] = 1e-3,
    threads: Annotated[int, typer.Option(min=1, help="Of every arm.")] = os.cpu_count() or 1,
    out: Annotated[Path | None, typer.Option("--json", help="All figures, as JSON.")] = None,
) -> None:
    """Measure training here beside transformers' Trainer with PEFT's QLoRA, a step each in turn.

    All arms start with the same adapter and see the same examples: trainer pads them, the others
    pack them. Each is a process of its own, so that its peak memory is its own.
    """
    from base.fingerprint import default_cache_dir
    from base.random_model import SHAPES, random_model
    from training.bench import rounds
    from training.bench.stream import Shape

    chosen = [name.strip() for name in arms.split(",")]
    unknown = sorted(set(chosen) - rounds.ARMS.keys())
    if unknown:
        raise typer.BadParameter(f"--arms {unknown[0]}: {', '.join(rounds.ARMS)}")
    if model not in SHAPES and not Path(model).is_dir():
        raise typer.BadParameter(f"--model {model}: a directory or one of {', '.join(SHAPES)}")
    cache = default_cache_dir() / "bench"
    directory = random_model(model, cache) if model in SHAPES else Path(model)
    shape = Shape(rows, length)
    with refusals():
        done = rounds.measure(
            *(directory, chosen, shape, steps),
            rank=rank,
            learning_rate=learning_rate,
            threads=threads,
            say=lambda line: console.print(line, style="dim"),
        )
    console.print(rounds.table(done))
    if out is not None:
        out.write_text(json.dumps(rounds.as_json(done, shape), indent=1) + "\n", encoding="utf-8")


def _sample(base: Base, sample: showcase.Sample, out: Path) -> dict[str, float]:
    """Exact match of each arm, by its name."""
    from training import showcase

    with progress() as shown:
        bars: dict[str, TaskID] = {}

        def evaluated(arm: str, done: int) -> None:
            if arm not in bars:
                bars[arm] = shown.add_task(arm, total=showcase.TEST_ITEMS)
            shown.update(bars[arm], completed=done)

        trained = bar(shown, sample.name, sample.config("mini"))
        arms = showcase.make_sample(base, sample, out, trained, evaluated)
    table = Table("exact match", str(out))
    for arm in arms:
        table.add_row(arm.name, f"{arm.score.rate:.1%}")
    console.print(table)
    return {arm.name: arm.score.rate for arm in arms}


def _tokenizer(source: str) -> Any:
    """The base's tokenizer alone; as it was kept, without transformers, from the second time on."""
    from base.fingerprint import default_cache_dir
    from base.kept_tokenizer import TokenizerFile

    directory = locate(str(MINI) if source == "mini" else source, None).directory
    file = TokenizerFile(default_cache_dir(), directory)
    kept = file.read()
    if kept is not None:
        return kept
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer class fails in its own way
        raise UnservableBase(f"the tokenizer cannot be loaded: {error}") from error
    file.save(made)
    return made


def _answer(base: Base, item: Example) -> str:
    text: str = base.tokenizer.decode(item.tokens[item.answer_start :], skip_special_tokens=True)
    return text
