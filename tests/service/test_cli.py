"""The `nibble` command: lazy, complete, and honest exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.main import get_command
from typer.testing import CliRunner

from service import cli

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "pydantic", "fastapi", "httpx", "sqlalchemy", "numpy")


def test_help_lists_every_command_and_imports_none() -> None:
    probe = (
        "import sys\nfrom service.cli import main\nsys.argv = ['nibble', '--help']\n"
        f"try: main()\nfinally: print('heavy:', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in [*cli.OWN, *cli.KNOWN]:
        assert f" {name} " in done.stdout
    assert "heavy: []" in done.stdout


@pytest.mark.parametrize("name", cli.OWN)
def test_every_own_command_answers_help(name: str) -> None:
    done = CliRunner().invoke(cli.app, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert f"nibble {name}" in done.output


def test_every_entry_point_is_a_typer_app() -> None:
    found = cli.installed()
    if found is None:
        pytest.skip("not installed: entry points come with the distribution")
    groups = {e.name: e.value for e in found.entry_points if e.group == cli.GROUP}
    assert set(groups) == set(cli.KNOWN)
    for target in groups.values():
        module, _, attribute = target.partition(":")
        assert type(getattr(import_module(module), attribute)).__name__ == "Typer"


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command below `name` that does something itself, by its whole name."""
    below = getattr(command, "commands", {})
    for key, one in below.items():
        yield from leaves(f"{name} {key}", one)
    stands_in = command.context_settings.get("ignore_unknown_options")  # for another wing's app
    if (not below or getattr(command, "invoke_without_command", False)) and not stands_in:
        yield name, command


def test_every_command_takes_json_but_the_one_that_never_ends() -> None:
    found = dict(
        one
        for name in [*cli.OWN, *cli.KNOWN]
        if cli.has(name)
        for one in leaves(name, get_command(cli.load(name)))
    )
    assert len(found) > 50
    for point in entry_points(group="nibble.base_builds"):
        found |= leaves(f"base build {point.name}", get_command(point.load()))
    without = {
        name
        for name, command in found.items()
        if not any("--json" in one.opts for one in command.params)
    }
    assert without == {"serve"}


@pytest.mark.parametrize(
    ("args", "field", "says"),
    [
        (["adapters", "push", "/nowhere", "--json"], "directory", "'/nowhere' does not exist"),
        (["adapters", "alias", "a", "prod", "--json"], None, "VERSION to point to"),
        (["generate", "--json", "--colour", "red", "hi"], None, "No such option: --colour"),
        (["train", "check", "--json", "--set", "x"], "data", "Missing argument 'data'"),
    ],
)
def test_wrong_usage_is_json_too_where_that_was_asked_for(
    args: list[str], field: str | None, says: str
) -> None:
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 2, done.output
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"message", "next", "field"}
    assert says in error["message"]
    assert (error["field"], "--help" in error["next"]) == (field, True)


def test_wrong_usage_is_text_where_json_is_a_file() -> None:
    done = CliRunner().invoke(cli.app, ["bench", "--json", "/tmp/figures.json", "--rounds", "0"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--rounds" in done.stderr


def test_groups_need_the_installed_package_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "installed", lambda: None)
    fresh = Typer()
    monkeypatch.setattr(cli, "app", fresh)
    cli._register_all()
    done = CliRunner().invoke(fresh, ["train", "lora", "--rank", "4"])
    assert done.exit_code == 1
    assert "make install" in done.output


def test_arguments_reach_the_command_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(cli, "_load", lambda target: lambda **given: seen.append(given))
    args = ["--help", "--new", "-x", "3", "word", "--flag=1", "two words"]
    done = CliRunner().invoke(cli.app, ["serve", *args])
    assert done.exit_code == 0, done.output
    assert seen == [{"args": args, "prog_name": "nibble serve"}]


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--version"], 0),
        (["nonsense"], 2),
        (["serve", "--prot", "1"], 2),
        (["serve", "--port", "many"], 2),
        (["config", "--port", "70000"], 2),
        (["generate"], 2),
        (["generate", "hello", "--max-new-tokens", "0"], 2),
        (["generate", "hello", "--url", "http://127.0.0.1:1"], 1),
        (["adapters", "push", "/does/not/exist"], 2),
    ],
)
def test_exit_status(args: list[str], status: int) -> None:
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == status, done.output


def completed(words: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    done = CliRunner().invoke(
        cli.app,
        prog_name="nibble",
        env={
            "_NIBBLE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "NIBBLE_URL": "http://127.0.0.1:1",
        },
    )
    return done.output.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("nibble ad", ["adapters"]),
        ("nibble adapters p", ["push"]),
        ("nibble adapters push --plac", ["--placement"]),
        ("nibble adapters push . --placement m", ["merged"]),
        ("nibble serve --max-ra", ["--max-rank"]),
        ("nibble chat --adapter ", []),  # nobody answers: no error in the middle of a line
    ],
)
def test_the_shell_completes_inside_commands(words: str, found: list[str]) -> None:
    assert completed(words) == found


def test_completion_of_names_asks_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.commands import server

    found = [{"name": name, "version": v} for v, name in enumerate(("cipher", "tickets", "tic"), 1)]
    monkeypatch.setattr(server.Client, "adapters", lambda self: {"adapters": found})
    assert completed("nibble chat --adapter ti") == ["tickets", "tic"]
    assert completed("nibble adapters show c") == ["cipher"]


def test_help_says_what_each_exit_status_means() -> None:
    said = " ".join(CliRunner().invoke(cli.app, ["--help"]).output.split())
    assert all(f"{code} {what.split(':')[0]}" in said for code, what in cli.EXIT_STATUS.items())
