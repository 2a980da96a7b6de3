"""`nibble eval`: adapters and prompts side by side on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adapters.errors import AdapterError
from adapters.prompts.template import PromptTemplate
from base.errors import UnservableBase
from base.kernels import Precision
from base.load import Base, load_base
from base.mini import MINI
from training import checkpoint
from training.errors import TrainingError
from training.evaluation.card import entry, store
from training.evaluation.prompts import find_template
from training.evaluation.questions import read_questions
from training.evaluation.scorecard import Metric, Question, Scores, compare, fitting, score
from training.evaluation.shots import Shots, read_shots
from training.evaluation.significance import Estimate, Paired
from training.terminal import DoubleQuant, print_json, refuse

TEMPLATE_FILE = "chat_template.jinja"
BASE = "base"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


class Asked(NamedTuple):
    """A way of asking."""

    suffix: str  # of a system's name
    prompt: str | None = None
    template: PromptTemplate | None = None
    shots: Shots | None = None


@dataclass(frozen=True, slots=True)
class System:
    """What is measured: the base or an adapter, asked plainly, with a system prompt, a template
    or examples."""

    name: str
    adapter: Path | None
    prompt: str | None
    template: PromptTemplate | None = None
    shots: Shots | None = None

    @property
    def told(self) -> str | None:
        """What a card says of how it was asked."""
        if self.shots is not None:
            return self.shots.told
        return f"template sha256:{self.template.digest}" if self.template else self.prompt


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked of every system, and how it is scored."""

    data: Path
    metrics: tuple[Metric, ...]  # none: those that fit the answers
    labels: tuple[str, ...] | None
    columns: Mapping[str, str]
    variables: frozenset[str]  # fields of the rows that templates take
    limit: int | None
    max_new_tokens: int | None
    max_length: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores by system, and how many questions each was asked."""

    scores: dict[str, Scores]
    questions: dict[str, int]
    first: str  # what the others are tested against
    against: dict[str, dict[str, Paired]]


@app.command()
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(exists=True, help="The right answers, in any shape of training data."),
    ],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, file_okay=False, help="A directory; may be repeated. Side by side."
        ),
    ] = None,
    system: Annotated[
        list[str] | None, typer.Option(help="A system prompt; may be repeated. Side by side.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt template: a YAML file, or name@version of --store; may be repeated. "
            "Its variables are fields of the rows."
        ),
    ] = None,
    store_home: Annotated[
        Path | None,
        typer.Option("--store", envvar="NIBBLE_HOME", help="Home of the server that has them."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Ask with so many answered examples too.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(exists=True, help="The file whose first rows --shots takes."),
    ] = None,
    base: Annotated[str, typer.Option(help="mini, a directory, or a hub id.")] = "mini",
    double_quant: DoubleQuant = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(get_args(Metric))}; default: those that fit the answers."),
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help="Labels, with commas; default: the answers that occur.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="prompt=question: take this column; may be repeated.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="exact, or fast: products in 8 bits, as a CPU serves by default.")
    ] = "exact",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    with_base: Annotated[bool, typer.Option(help="Measure the base beside adapters.")] = True,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 20, help="Default: 1.5 times the longest right answer."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, max=1 << 20)] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, max=4096)] = 64,
    keep: Annotated[
        bool, typer.Option(help="Add the figures to evaluation.json beside each adapter.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all answers.")] = False,
) -> None:
    """Measure adapters and ways of asking on the same questions: 95 % intervals, paired tests.

    The first system is what the others are tested against: the base, unless --no-with-base.
    """
    try:
        templates = {one: find_template(one, store_home) for one in template or ()}
        order = Order(
            data=data,
            metrics=_metrics(metric),
            labels=tuple(label.strip() for label in choices.split(",")) if choices else None,
            columns=_columns(column or []),
            variables=frozenset(v.name for one in templates.values() for v in one.variables),
            limit=limit,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            batch_size=batch_size,
        )
        few = _shots(shots, examples, order.columns)
        systems = _systems(adapter or [], system or [], with_base, templates, few)
        model = _model(base, precision, double_quant)
        found = _measured(model, systems, order)
        if keep:
            _keep(model, data, systems, found)
    except (TrainingError, UnservableBase, AdapterError, ValueError) as error:
        refuse(str(error))
    if as_json:
        print_json(_as_json(found))
    else:
        console.print(_table(found, data))
        if found.against:
            console.print(_tests(found))


def _model(base: str, precision: str, double_quant: bool | None) -> Base:
    source = MINI if base == "mini" else base
    kind = _precision(precision)
    model = load_base(source, dtype=_dtype(), double_quant=double_quant, precision=kind)
    if model.tokenizer is None:
        raise TrainingError(f"base {base} has no tokenizer, so nothing can be asked")
    return model


def _shots(count: int | None, file: Path | None, columns: Mapping[str, str]) -> Shots | None:
    if count is None and file is None:
        return None
    if count is None or file is None:
        given, other = (
            ("--shots", "--examples FILE") if file is None else ("--examples", "--shots N")
        )
        raise TrainingError(f"{given} needs {other}: how many examples, and of which file")
    return read_shots(file, count, columns)


def _measured(model: Base, systems: Sequence[System], order: Order) -> Measured:
    """Every system on the same questions; the first is what the others are tested against."""
    found: dict[str, Scores] = {}
    numbers: dict[str, int] = {}
    for one in systems:
        questions = read_questions(
            order.data,
            model.tokenizer,
            max_length=order.max_length,
            template=_template(one.adapter),
            columns=order.columns,
            system=one.prompt,
            limit=order.limit,
            prompt=one.template,
            variables=order.variables,
            shots=one.shots,
        )
        numbers[one.name] = len(questions)
        found[one.name] = _score(model, one, questions, order)
    first = systems[0].name
    against = {name: compare(s, found[first]) for name, s in found.items() if name != first}
    return Measured(found, numbers, first, against)


def _dtype() -> str:
    """In fp32 on a CPU, in what the device computes best elsewhere: as adapters are trained."""
    return "auto" if torch.cuda.is_available() else "float32"


def _precision(given: str) -> Precision:
    if given == "exact":
        return "exact"
    if given == "fast":
        return "fast"
    raise TrainingError(f"precision {given!r}: exact or fast is needed")


def _metrics(given: list[str] | None) -> tuple[Metric, ...]:
    known: tuple[Metric, ...] = get_args(Metric)
    for name in given or ():
        if name not in known:
            raise TrainingError(f"metric {name!r}: one of {', '.join(known)} is needed")
    return tuple(name for name in known if name in (given or ()))


def _systems(
    adapters: Sequence[Path],
    prompts: Sequence[str],
    with_base: bool,
    templates: Mapping[str, PromptTemplate],
    shots: Shots | None,
) -> list[System]:
    """The base and the adapters, each plain, with each prompt, with each template and with shots.
    Without the base and adapters, templates and shots alone. Raises TrainingError where there is
    nothing to measure, or two would have one name."""
    if not adapters and not with_base and not templates and not shots:
        raise TrainingError("nothing to measure: name an --adapter, or leave out --no-with-base")
    models: list[tuple[str, Path | None]] = [(BASE, None)] if with_base or not adapters else []
    names = [path.resolve().name for path in adapters]
    for path, name in zip(adapters, names, strict=True):
        models.append((name if names.count(name) == 1 and name != BASE else str(path), path))
    asked = [Asked("")]
    asked += [Asked(f" + prompt {number}", text) for number, text in enumerate(prompts, start=1)]
    asked += [Asked(f" + {name}", template=one) for name, one in templates.items()]
    asked += [Asked(f" + {len(shots.turns)} shots", shots=shots)] if shots else []
    if not adapters and not with_base:
        asked = asked[1:]
    found = [
        System(name + way.suffix, path, way.prompt, way.template, way.shots)
        for (name, path), way in product(models, asked)
    ]
    if len({one.name for one in found}) < len(found):
        raise TrainingError(f"an adapter is named twice: {', '.join(map(str, adapters))}")
    return found


def _columns(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in given:
        field, equals, column = one.partition("=")
        if not equals or not field or not column:
            raise TrainingError(f"--column {one!r}: field=column is needed, prompt=question")
        found[field] = column
    return found


def _template(adapter: Path | None) -> str | None:
    """The adapter's own chat template, if it has one."""
    path = adapter / TEMPLATE_FILE if adapter else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else None


def _score(model: Base, system: System, questions: Sequence[Question], order: Order) -> Scores:
    attached = checkpoint.load(system.adapter, model) if system.adapter else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        shown = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        with shown as progress:
            bar = progress.add_task(escape(system.name), total=len(questions))
            return score(
                model,
                questions,
                order.metrics or fitting(questions),
                adapter=attached,
                choices=order.labels,
                max_new_tokens=order.max_new_tokens,
                batch_size=order.batch_size,
                report=lambda done: progress.update(bar, completed=done),
            )
    finally:
        if attached is not None:
            attached.detach()


def _keep(model: Base, data: Path, systems: Sequence[System], found: Measured) -> None:
    for one in systems:
        if one.adapter is not None:
            against = found.against.get(one.name)
            tests = {} if against is None else {found.first: against}
            scores, questions = found.scores[one.name], found.questions[one.name]
            store(one.adapter, entry(model, data, questions, scores, tests, one.told))


def _shown(name: str, figure: Estimate) -> str:
    if name == "perplexity":
        return f"{figure.value:.3f}\n{figure.low:.3f} to {figure.high:.3f}"
    return f"{figure.value:.1%}\n{figure.low:.1%} to {figure.high:.1%}"


def _table(measured: Measured, data: Path) -> Table:
    found, questions = measured.scores, measured.questions[measured.first]
    names = list(dict.fromkeys(name for scores in found.values() for name in scores.figures))
    table = Table(title=f"{escape(str(data))}: {questions:,} questions", title_justify="left")
    for name in ("", *names):
        table.add_column(name.replace("_", " "))
    for system, scores in found.items():
        figures = scores.figures
        cells = [_shown(name, figures[name]) if name in figures else "–" for name in names]
        table.add_row(escape(system), *cells)
    return table


def _tests(found: Measured) -> Table:
    table = Table(title=f"less {escape(found.first)}, on the same questions", title_justify="left")
    for head in ("", "figure", "difference", "95 % interval", "p", "test"):
        table.add_column(head)
    for system, tests in found.against.items():
        for name, paired in sorted(tests.items()):
            d = paired.difference
            if name == "perplexity":
                name, shown = "nats per token", [f"{v:+.3f}" for v in (d.value, d.low, d.high)]
            else:
                shown = [f"{100 * v:+.1f}" for v in (d.value, d.low, d.high)]
            p = "< 0.001" if paired.p < 0.001 else f"{paired.p:.3f}"
            between = f"{shown[1]} to {shown[2]}"
            table.add_row(escape(system), name.replace("_", " "), shown[0], between, p, paired.test)
    return table


def _as_json(found: Measured) -> dict[str, Any]:
    tests = found.against
    return {
        "against": found.first,
        "systems": {
            name: {
                "figures": {key: asdict(figure) for key, figure in scores.figures.items()},
                "tests": {key: asdict(paired) for key, paired in tests.get(name, {}).items()},
                "said": list(scores.said),
            }
            for name, scores in found.scores.items()
        },
    }
