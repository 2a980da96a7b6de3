"""The `nibble` command: finds the command that was asked for, and imports nothing else.

Our own commands are listed here; each wing brings more through the entry-point group
`nibble.commands`, so that `nibble train` needs no import from one wing to the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

DISTRIBUTION = "nibble-serve"
GROUP = "nibble.commands"

OWN = {
    "serve": ("service.commands.serve:app", "Serve one base and its adapters over HTTP."),
    "chat": (
        "service.commands.chat:app",
        "Talk with a running server; change adapters on the way.",
    ),
    "generate": ("service.commands.generate:app", "Ask a running server for a text."),
    "adapters": ("service.commands.adapters:app", "Push, list, show and remove adapters."),
    "jobs": ("service.commands.jobs:app", "Train on a running server, and follow it."),
    "templates": (
        "service.commands.templates:app",
        "Push, list, show, render and remove prompt templates.",
    ),
    "rag": ("service.commands.rag:app", "Collections of documents, and questions to them."),
    "keys": ("service.commands.keys:app", "Create, list, rotate and revoke API keys."),
    "audit": ("service.commands.audit:app", "Verify and search the record of what was done."),
    "tenants": ("service.commands.tenants:app", "Quotas of tenants, and what they share."),
    "config": ("service.commands.config:app", "Print the effective configuration."),
    "plan": ("service.commands.plan:app", "How many servers a load needs."),
    "catalog": ("service.commands.catalog:app", "Bring the catalog's tables up to date."),
    "conformance": (
        "service.commands.conformance:app",
        "Check every kind of adapter against PEFT, in mixed batches.",
    ),
    "doctor": ("service.commands.doctor:app", "Tell what this machine is and what fits on it."),
}
# One line for each known group, so that `nibble --help` need not import it.
KNOWN = {
    "base": "Build and inspect base models.",
    "train": "Train adapters on the same base that serves them.",
    "eval": "Measure adapters and prompts side by side, with intervals and tests.",
    "compare": "Compare methods, rates and seeds with one budget: a study and its report.",
    "bench": "Measure throughput and latency on this machine.",
}

EXIT_STATUS = {
    0: "done",
    1: "failed: the server refused, nothing answers, a check found something",
    2: "wrong usage: an unknown flag, a value out of bounds, a file that is not there",
    130: "ended by Ctrl-C",
}


class Lazy(TyperGroup):
    """Commands that load when they run; for the shell's completion also when it stands inside."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if ctx.resilient_parsing and name and has(name):
            command = get_command(load(name))
        return name, command, rest


app = typer.Typer(
    name="nibble",
    cls=Lazy,
    help="One 4-bit base model, loaded once; every request names an adapter.",
    epilog="Exit status: "
    + "; ".join(f"{code} {what}" for code, what in EXIT_STATUS.items())
    + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_targets: dict[str, str] = {}  # name -> module:attribute of its Typer app


def installed() -> Distribution | None:
    """The installed distribution; None when the code runs from a checkout that is not."""
    try:
        return Distribution.from_name(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def _print_version(wanted: bool) -> None:
    if wanted:
        found = installed()
        typer.echo(f"nibble {found.version if found else '(not installed)'}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def has(name: str) -> bool:
    """Whether this command is there, installed."""
    return name in _targets


def load(name: str) -> Any:
    """The Typer app of a command."""
    return _load(_targets[name])


def _forward(name: str, target: str) -> Callable[[typer.Context], None]:
    """A command that hands its arguments, `--help` too, to the Typer app at `target`."""

    def run(ctx: typer.Context) -> None:
        told: dict[str, Any] = {"args": ctx.args, "prog_name": f"nibble {name}"}
        if "--json" not in ctx.args:
            _load(target)(**told)
            return
        try:
            status = _load(target)(**told, standalone_mode=False)
        except typer.TyperException as error:
            _refuse(error)
        raise typer.Exit(status if isinstance(status, int) else 0)

    return run


def _refuse(error: typer.TyperException) -> NoReturn:
    """Wrong usage of a command that was asked for JSON. Where `--json` takes a path, or is none of
    the command's, nothing was asked for."""
    context = getattr(error, "ctx", None)
    if context is None or not any(
        "--json" in one.opts and one.is_flag for one in context.command.params
    ):
        from typer import rich_utils

        rich_utils.rich_format_error(error)  # type: ignore[arg-type]
        raise typer.Exit(error.exit_code)
    from service.commands.output import fail

    param = getattr(error, "param", None)
    fail(
        error.format_message(),
        f"`{context.command_path} --help` says what it takes",
        as_json=True,
        status=error.exit_code,
        field=param.name if param is not None else None,
    )


def _not_installed(name: str) -> Callable[[], None]:
    def run() -> None:
        typer.echo(
            f"nibble {name} comes with the installed package, and {DISTRIBUTION} is not installed "
            "here: run `pip install -c constraints.txt -e .` (or `make install`) and try again.",
            err=True,
        )
        raise typer.Exit(1)

    return run


def _register(name: str, help: str, run: Callable[..., None]) -> None:
    app.command(
        name,
        help=help,
        add_help_option=False,
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
    )(run)


def _register_all() -> None:
    for name, (target, help) in OWN.items():
        _targets[name] = target
        _register(name, help, _forward(name, target))
    found = installed()
    groups = {e.name: e.value for e in found.entry_points if e.group == GROUP} if found else {}
    _targets.update(groups)
    for name in sorted(groups.keys() | KNOWN.keys()):
        help = KNOWN.get(name, f"Commands of {groups.get(name)}.")
        _register(
            name, help, _forward(name, groups[name]) if name in groups else _not_installed(name)
        )


_register_all()


def main() -> None:
    """Entry point. EXIT_STATUS says what it ends with."""
    app(args=sys.argv[1:], prog_name="nibble")


if __name__ == "__main__":
    main()
