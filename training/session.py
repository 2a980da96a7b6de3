"""One run, from its config to the files that it leaves, told on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from base.hub import locate
from base.load import Base, load_base, load_float
from base.mini import MINI
from base.scales import double_quant_of
from training.config import TrainConfig
from training.data import Prepared, prepare
from training.distributed import World, world
from training.errors import ConfigError
from training.interrupts import interrupts
from training.methods import METHODS, Attached, attach
from training.recipe import Step, Trained, train, with_steps
from training.run_directory import RunDirectory
from training.terminal import bar, console, progress
from training.trackers import asked_for, tracked

TEMPLATE_FILE = "chat_template.jinja"  # beside an adapter; `nibble adapters push` sends it along
PROMPT_FILE = "prompt_template.yaml"  # beside an adapter that was trained with one


def run(
    config: TrainConfig,
    resume: bool = False,
    go_on: bool = False,
    overwrite: bool = False,
    before: Callable[[Base, Prepared], None] = lambda base, found: None,
) -> Trained:
    """Train as `config` says and save what came out in `config.out`.

    `resume` from its last checkpoint, which must be there; `go_on` from it where there is one.
    Without these, what an earlier run left there is replaced only to `overwrite` it.
    `before` sees the base as it is loaded, in the process that writes.
    """
    here = world()
    console.quiet = console.quiet or not here.leads
    directory = RunDirectory(config.out, writes=here.leads)
    asked_for(config)
    config = resolved(config)
    resume = resume or (go_on and has_begun(here, directory))
    state = directory.resume(config) if resume else None
    if state is None and not overwrite:
        directory.refuse_to_overwrite()
    if here.sharded:
        check_sharding(config)
    base = load_for(config)
    found = prepare(config.data, base.tokenizer)
    config = with_steps(config, found.train)
    say_what_is_wrong(found)
    if here.leads:
        before(base, found)
    if here.sharded:
        here.shard(base.model)
    torch.manual_seed(config.seed)
    adapter = attach(base, config)
    if state is None:
        directory.begin(config)
    done = _trained(config, here, directory, base, adapter, found, state)
    _leave(config, here, adapter, found, done)
    directory.happened("finished", **done.figures())
    if config.publish is not None and done.ended != "asked" and here.leads:
        from training.publish import publish

        where = publish(config, base)
        directory.happened("published", adapter=where)
        done = replace(done, published=where)
        console.print(f"published as {where}")
    console.print(outcome(config, done))
    return done


def has_begun(here: World, directory: RunDirectory) -> bool:
    """Is there a checkpoint? Raises ConfigError where only some processes see one."""
    see = here.sums(float(directory.checkpoint.exists()))[0]
    if see not in (0, here.size):
        raise ConfigError(
            f"{directory.checkpoint}: {see:.0f} of {here.size} processes see it; `out` must be "
            "on a volume that all machines of a run mount",
            "out",
        )
    return see > 0


def _trained(
    config: TrainConfig,
    here: World,
    directory: RunDirectory,
    base: Base,
    adapter: Attached,
    found: Prepared,
    state: dict[str, Any] | None,
) -> Trained:
    """The steps, logged in the run's directory, on the terminal and by its trackers."""
    started_at = 0 if state is None else state["progress"]["step"]
    directory.happened(
        "started",
        step=started_at,
        steps=config.optim.steps,
        examples=len(found.train),
        held_out=len(found.held_out),
    )
    with (
        tracked(config, directory.path, started_at) if here.leads else nullcontext() as track,
        progress(here.leads) as shown,
        interrupts(once=here.size == 1) as asked,
    ):
        show = bar(shown, "train", config)

        def report(step: Step) -> None:
            directory.note(step)
            show(step)
            if track is not None:
                track(step)

        def keep(state: dict[str, Any]) -> None:
            directory.keep(config, state)
            directory.happened("checkpoint", step=state["progress"]["step"])

        return train(
            base,
            adapter,
            found.train,
            found.held_out,
            config,
            report,
            resume=state,
            keep=keep,
            asked_to_stop=asked,
            world=here,
        )


def _leave(
    config: TrainConfig, here: World, adapter: Attached, found: Prepared, done: Trained
) -> None:
    """Write the adapter, or the base, and what belongs beside it."""
    if here.leads:
        _save_template(config.out / TEMPLATE_FILE, found.template)
        prompt = found.prompt.as_yaml() if found.prompt else None
        _save_template(config.out / PROMPT_FILE, prompt)
    if here.leads or here.sharded:
        adapter.save(config.out)
    if here.leads and not METHODS[config.method.kind].makes_base:
        from training.publish import note_origin

        note_origin(config, done)


def resolved(config: TrainConfig) -> TrainConfig:
    """The config with its double quantisation said, so that a run's record and its continuation do
    not depend on a default; False where the method trains the base itself, in floating point."""
    source = MINI if config.base == "mini" else locate(config.base).directory
    double = not METHODS[config.method.kind].makes_base and double_quant_of(
        source, config.double_quant
    )
    return config.model_copy(update={"double_quant": double})


def load(source: str, double_quant: bool | None = None) -> Base:
    """In fp32 on a CPU, in what the device computes best elsewhere."""
    dtype = "auto" if torch.cuda.is_available() else "float32"
    return load_base(MINI if source == "mini" else source, dtype=dtype, double_quant=double_quant)


def load_for(config: TrainConfig) -> Base:
    """The base as the run's method needs it: in NF4, or in fp32 where it is to learn itself."""
    if METHODS[config.method.kind].makes_base:
        return load_float(MINI if config.base == "mini" else config.base)
    return load(config.base, config.double_quant)


def check_sharding(config: TrainConfig) -> None:
    """Raises ConfigError for a run whose weights cannot be cut among the processes."""
    if not METHODS[config.method.kind].makes_base:
        raise ConfigError(
            f"FSDP with method {config.method.kind}: the base is in NF4 and the adapter is small, "
            "so there is nothing to cut; deploy/accelerate/ddp.yaml is right"
        )
    if not getattr(config.method, "embeddings", True):
        raise ConfigError("FSDP cuts every weight alike: method.embeddings must be true")


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


def _save_template(path: Path, template: str | None) -> None:
    """What the run was trained with goes beside it; an earlier run's template must not stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if template is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(template, encoding="utf-8")
