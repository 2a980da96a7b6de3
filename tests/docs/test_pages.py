"""Cheap checks of every page: links lead somewhere, commands and flags exist, scripts parse."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from service import cli
from service.config import Settings
from tests.docs.blocks import PAGES, ROOT, Block, blocks, said

TEXTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md")),
]
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MADE = {"architecture.md", "index.md"}  # by docs/site.py, with the reference


def named(one: Any) -> str:
    return one.name if isinstance(one, Block) else str(one.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The marks of headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, mark in _LINK.findall(_FENCED.sub("", text)):
        target = page.parent / path if path else page
        if path in MADE or "reference/" in path:
            assert page.is_relative_to(ROOT / "docs"), f"{path} is there in the site only"
            continue
        assert target.exists(), f"{path} does not exist"
        if mark and target.suffix == ".md":
            assert mark in anchors(target.read_text(encoding="utf-8")), f"{path}#{mark}"


ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "sh"], ids=named)
def test_every_shell_block_parses_and_its_commands_exist(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in block.code.replace("\\\n", " ").splitlines():
        for command in re.findall(r"\.venv/bin/nibble ([^|;&()]*)", line):
            check(shlex.split(command, comments=True))


def check(words: list[str]) -> None:
    """That the command exists, and each of its flags."""
    if words[0].startswith("-"):
        return
    assert cli.has(words[0]), f"nibble {words[0]} does not exist"
    command: Any = get_command(cli.load(words[0]))
    while words[1:] and words[1] in getattr(command, "commands", {}):
        words = words[1:]
        command = command.commands[words[0]]
    if command.context_settings.get("ignore_unknown_options"):
        return  # another app's, found when it runs
    known = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
    known.add("--help")
    for word in words[1:]:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--?[a-z][a-z-]*", flag):
            assert flag in known, f"{command.name} has no {flag}; it has {sorted(known)}"


def test_a_wrong_flag_would_be_noticed() -> None:
    check(shlex.split("adapters push here --name desk"))
    with pytest.raises(AssertionError, match="--nam"):
        check(shlex.split("adapters push here --nam desk"))
    with pytest.raises(AssertionError, match="nibble adaptors"):
        check(["adaptors", "list"])


def test_the_reference_has_every_setting_and_command() -> None:
    from service import reference

    settings = reference.configuration_page()
    assert all(f"| `{name}` |" in settings for name in Settings.model_fields)
    commands = reference.commands_page()
    assert all(f"\n## nibble {name}\n" in commands for name in reference.commands())
    assert "#### nibble adapters push" in commands or "### nibble adapters push" in commands
    assert "`--max-new-tokens`" in commands
    assert all(f"| {code} | {what} |" in commands for code, what in cli.EXIT_STATUS.items())


def test_output_is_compared_by_what_it_means(tmp_path: Path) -> None:
    """Spaces, the order of keys and of replies that ran at once do not matter; all else does."""
    assert said('{"b": 1, "a": 2}{"c":3}') == said('{"c": 3}\n{"a": 2, "b": 1}\n')
    assert said('{"a": 2}') != said('{"a": 3}')
    assert said("flute\n  [1] dorin.md\n") == said("flute\n[1]  dorin.md")
    assert said("flute") != said("lute")
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\none\n```\n\n```\n1\n```\n\nThen:\n\n```sh\ntwo\n```\n\nAnd\n\n```json\n{}\n```\n"
    )
    assert [(b.line, b.code, b.shown) for b in blocks(page)] == [
        (1, "one\n", "1\n"),
        (11, "two\n", None),
    ]
