"""Where a base lies: a directory, or a snapshot of a hub repository."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.checkpoint import INDEX, WEIGHTS, shard_names
from base.errors import UnservableBase
from base.mini import MINI

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Configuration and tokenizer; never Python, never a second copy of the weights in another layout.
_SMALL_FILES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True, slots=True)
class Source:
    """A base on this machine: its directory, its name, and the commit where it has one."""

    directory: Path
    id: str
    revision: str  # the hub's commit; "" for a plain directory


def locate(source: str, revision: str | None = None) -> Source:
    """The directory of a base; a hub id is downloaded first, or found in the hub's own cache.

    A hub id is one that has the form `organisation/name` and is no directory here. `revision` is a
    branch, a tag or a commit of the hub; the commit it means now is kept in the answer.
    """
    directory = Path(source).expanduser()
    if not source:
        raise UnservableBase("no base is named: give a directory or a hub id")
    if directory.is_dir():
        if revision is not None:
            raise UnservableBase(f"{source} is a directory; revision={revision!r} is for hub ids")
        return Source(directory, _name(directory.resolve()), "")
    if directory.exists():
        raise UnservableBase(f"{source} is a file; a base is a directory or a hub id")
    if not _HUB_ID.fullmatch(source):
        raise UnservableBase(f"{source} is neither a directory nor a hub id (organisation/name)")
    return _download(source, revision)


def _name(directory: Path) -> str:
    """What a directory's base is called: its own name, but for the embedded base."""
    return "mini" if directory == MINI.resolve() else directory.name


def _download(repository: str, revision: str | None) -> Source:
    """The small files first: the index among them tells which weight files are wanted."""
    snapshot = _snapshot(repository, revision, _SMALL_FILES)
    index = snapshot / INDEX
    weights = shard_names(index) if index.is_file() else (WEIGHTS,)
    # From here on the commit, so that a push between the two cannot mix two revisions.
    _snapshot(repository, snapshot.name, weights)
    if not (snapshot / weights[0]).is_file():
        raise UnservableBase(f"{repository} has no {weights[0]}; only safetensors are read")
    return Source(snapshot, repository, snapshot.name)


def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found: Any = snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*.py"]
        )
    except Exception as error:  # offline, no such repository, gated, a broken connection, no space
        where = f"{repository} at revision {revision}" if revision else repository
        raise UnservableBase(
            f"{where} is no directory here, and the hub does not give it: {error}"
        ) from error
    return Path(found)
