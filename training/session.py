"""One run, from its config to the files that it leaves, told on the terminal."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.text import Text

from base.load import Base, load_base, load_float
from base.mini import MINI
from training.config import TrainConfig
from training.data import Prepared, prepare
from training.interrupts import interrupts
from training.methods import METHODS, attach
from training.recipe import Step, Trained, train
from training.run_directory import RunDirectory
from training.terminal import bar, console, progress

TEMPLATE_FILE = "chat_template.jinja"  # beside an adapter; `nibble adapters push` sends it along


def run(config: TrainConfig, resume: bool = False) -> Trained:
    """Train as `config` says and save what came out in `config.out`."""
    directory = RunDirectory(config.out)
    state = directory.resume(config) if resume else None
    base = load_for(config)
    found = prepare(config.data, base.tokenizer)
    say_what_is_wrong(found)
    torch.manual_seed(config.seed)
    adapter = attach(base, config)
    if state is None:
        directory.begin(config)
    with progress() as shown, interrupts() as asked:
        show = bar(shown, "train", config)

        def report(step: Step) -> None:
            directory.note(step)
            show(step)

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
    _save_template(config.out, found.template)
    adapter.save(config.out)
    console.print(outcome(config, done))
    return done


def load(source: str) -> Base:
    """In fp32 on a CPU, in what the device computes best elsewhere."""
    dtype = "auto" if torch.cuda.is_available() else "float32"
    return load_base(MINI if source == "mini" else source, dtype=dtype)


def load_for(config: TrainConfig) -> Base:
    """The base as the run's method needs it: in NF4, or in fp32 where it is to learn itself."""
    if METHODS[config.method.kind].makes_base:
        return load_float(MINI if config.base == "mini" else config.base)
    return load(config.base)


def outcome(config: TrainConfig, done: Trained) -> str:
    """What a run did, in one line."""
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


def say_what_is_wrong(found: Prepared) -> None:
    """What a run that goes on all the same must not pass over in silence."""
    for report in found.reports:
        if said := report.summary():
            console.print(Text(f"{report.path}: {said}; see nibble train check", style="yellow"))


def _save_template(out: Path, template: str | None) -> None:
    """What the run was trained with goes beside it; an earlier run's template must not stay."""
    out.mkdir(parents=True, exist_ok=True)
    if template is None:
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        (out / TEMPLATE_FILE).write_text(template, encoding="utf-8")
