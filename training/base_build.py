"""A new base made from one in floating point, with a table of what it learnt and what it forgot.

out/                     the base, as transformers reads it; `nibble serve --base out` serves it
out/evaluation.json      before and after, and after over NF4 weights, which is what is served
out/README.md            its card, written from that
out/run/before.json      the measurement that a resumed run does not repeat
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base.load import Base, load_base, load_float
from base.mini import evaluate as mini
from base.mini.environment import environment
from training import session
from training.config import BuildConfig, DataConfig
from training.data import Corpus, Example, Prepared, examples, prepare, read_rows
from training.evaluate import exact_match
from training.recipe import Trained, mean_loss
from training.terminal import console

OF_MINI = mini.Size(context=10, tasks=20, texts=30)
_LOSS, _EXACT = "loss, nats a token", "exact match"


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table: a loss, or the part of answers that are right."""

    name: str
    unit: str
    value: float
    count: int | None = None  # answers, where their number is known
    low: float | None = None  # 95 % interval
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same line before, after, and after over NF4."""

    before: Measured
    after: Measured
    served: Measured


def build(
    config: BuildConfig, resume: bool = False, overwrite: bool = False
) -> tuple[Trained, list[Comparison]]:
    """Train the new base into `config.out`; the table is empty where the run was interrupted."""
    seen: list[Prepared] = []
    note = config.out / "run" / "before.json"
    started: list[Measured] = []

    def before(base: Base, found: Prepared) -> None:
        seen.append(found)
        if resume and note.is_file():
            started.extend(Measured(**row) for row in json.loads(note.read_text("utf-8")))
        else:
            console.print("measuring the base as it is")
            started.extend(measure(base, found.held_out, config))
            note.parent.mkdir(parents=True, exist_ok=True)
            _write_json(note, [asdict(row) for row in started])

    done = session.run(config, resume, overwrite=overwrite, before=before)
    if done.ended == "asked" or not seen:  # without `seen`, another process writes
        return done, []
    console.print("measuring what came out")
    after = measure(load_float(config.out), seen[0].held_out, config)
    served = measure(load_base(config.out, keep=False), seen[0].held_out, config)
    table = [Comparison(*row) for row in zip(started, after, served, strict=True)]
    write_card(config, done, table)
    return done, table


def measure(base: Base, held_out: Sequence[Example], config: BuildConfig) -> list[Measured]:
    """Each line of the table for this base."""
    return [*_losses(base, held_out, config), *_answers(base, config), *_own(base, config)]


def _losses(base: Base, held_out: Sequence[Example], config: BuildConfig) -> Iterator[Measured]:
    if held_out:
        yield Measured("the new data, held out", _LOSS, mean_loss(base, held_out, 8))
    if config.measure.general is not None:
        yield Measured("general text", _LOSS, mean_loss(base, _general(base, config), 8))


def _general(base: Base, config: BuildConfig) -> Corpus:
    path = config.measure.general
    assert path is not None
    fields = {"train": path, "raw": path.is_dir(), "max_length": config.data.max_length}
    return prepare(DataConfig.model_validate({**fields, "too_long": "cut"}), base.tokenizer).train


def _answers(base: Base, config: BuildConfig) -> Iterator[Measured]:
    """Exact match of the greedy answer on each of `measure.tasks`."""
    for name, path in config.measure.tasks.items():
        rows = (row for _, row in zip(range(config.measure.items), read_rows(path), strict=False))
        items = examples(rows, base.tokenizer, config.data.max_length)
        score = exact_match(
            base,
            [item.tokens[: item.answer_start] for item in items],
            [_text(base, item.tokens[item.answer_start :]) for item in items],
            max_new_tokens=config.measure.max_new_tokens,
        )
        yield Measured(name, _EXACT, score.rate, score.total, *score.interval)


def _text(base: Base, tokens: Sequence[int]) -> str:
    text: str = base.tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _own(base: Base, config: BuildConfig) -> Iterator[Measured]:
    """What the embedded base was built for, on items that it was never shown."""
    if config.base != "mini":
        return
    found = mini.measure(base.model, base.tokenizer.backend_tokenizer, OF_MINI)
    asked = OF_MINI.tasks * (len(found["tasks"]) - 1)
    yield Measured("its own tasks", _EXACT, found["tasks"]["all"], asked)
    asked = OF_MINI.context * (len(found["context"]) - 4)
    yield Measured("its own answers from context", _EXACT, found["context"]["all"], asked)
    for name, loss in found["loss"].items():
        yield Measured(f"its own text: {name}", _LOSS, loss)


def write_card(config: BuildConfig, done: Trained, table: Sequence[Comparison]) -> None:
    """evaluation.json, and README.md made from it."""
    found = {
        "from": config.base,
        "config": config.model_dump(mode="json"),
        "run": asdict(done),
        "table": [asdict(row) for row in table],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "environment": environment(),
    }
    _write_json(config.out / "evaluation.json", found)
    (config.out / "README.md").write_text(card(found), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def card(found: dict[str, Any]) -> str:
    """The card of a new base, in Markdown, from its evaluation.json."""
    config, run = found["config"], found["run"]
    data, optim = config["data"], config["optim"]
    rows = "\n".join(
        "| " + " | ".join(line) + " |"
        for line in lines(
            Comparison(*(Measured(**row[when]) for when in ("before", "after", "served")))
            for row in found["table"]
        )
    )
    kept = f"; the weights of step {run['best_step']:,}" if run["best_step"] else ""
    what = "raw text" if data["raw"] else "rows"
    machine = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    return f"""# {config["out"]}

Made from `{found["from"]}` by training {run["parameters"]:,} weights in floating point, on \
{what} of `{data["train"]}`.

| | before | after | after, over NF4 |
|---|---|---|---|
{rows}

Greedy answers, to the letter, with 95 % intervals. "Over NF4" is what `nibble serve --base` serves.

- {run["steps"]:,} steps of {optim["batch_size"]} rows, rate {optim["learning_rate"]:g}, seed \
{config["seed"]}; {run["tokens"]:,} tokens in {run["seconds"]:.0f} s{kept}
- Stored in {config["method"]["store"]}; made on {found["date"]}: {machine}
- The licence of `{found["from"]}` and of the data hold for it too.
"""


def lines(table: Iterator[Comparison] | Sequence[Comparison]) -> Iterator[tuple[str, ...]]:
    """(what, before, after, served) of each line, for people."""
    for row in table:
        yield (
            f"{row.before.name} ({row.before.unit})",
            *(_shown(one) for one in (row.before, row.after, row.served)),
        )


def _shown(one: Measured) -> str:
    if one.unit == _LOSS:
        return f"{one.value:.3f}"
    if one.low is None or one.high is None:
        return f"{one.value:.1%}"
    return f"{one.value:.1%} ({one.low:.1%} to {one.high:.1%})"
