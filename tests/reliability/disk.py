"""A disk that forgets: what a power loss may leave of the changes that `faults.c` wrote down.

Only what was synced is sure. A file's bytes are durable after fsync of the file, a name after fsync
of its directory; this is POSIX and no more, so a file system that does better is covered too.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEAD = struct.Struct("<cqIII")
SECTOR = 512  # a write may be torn here


@dataclass(frozen=True, slots=True)
class Change:
    kind: str  # create, truncate, write, sync, rename, directory (mkdir), unlink, or a remark (!)
    path: str
    to: str
    offset: int
    data: bytes


def read_log(path: Path) -> Iterator[Change]:
    raw, at = path.read_bytes(), 0
    while at < len(raw):
        kind, offset, one, two, size = HEAD.unpack_from(raw, at)
        at += HEAD.size
        texts = raw[at : at + one].decode(), raw[at + one : at + one + two].decode()
        at += one + two
        yield Change(kind.decode(), *texts, offset, raw[at : at + size])
        at += size


@dataclass(slots=True)
class Inode:
    """A file or a directory: what is durable, and what was done since."""

    content: bytes = b""
    names: dict[str, Inode] | None = None  # of a directory
    pending: list[Any] = field(default_factory=list)
    live: dict[str, Inode] = field(default_factory=dict)  # names as a process sees them


class Disk:
    def __init__(self, root: Path) -> None:
        self._base = root
        self.root = _read(root)

    def apply(self, change: Change) -> None:
        if change.kind == "!":
            return
        if change.kind == "s":
            inode = self._find(change.path)
            if inode is not None:
                _settle(inode, lambda _: True)
        elif change.kind in "cd":
            parent, name = self._parent(change.path)
            made = Inode(names={} if change.kind == "d" else None)
            _name(parent, name, made)
        elif change.kind == "u":
            _name(*self._parent(change.path), None)
        elif change.kind == "r":
            moved = self._find(change.path)
            assert moved is not None, change.path
            _name(*self._parent(change.to), moved)
            _name(*self._parent(change.path), None)
        else:
            inode = self._find(change.path)
            if inode is not None:  # else it was unlinked: nobody will read it again
                data = change.data if change.kind == "w" else None
                inode.pending.append((change.offset, data))

    def leave(self, target: Path, kept: Callable[[Inode], bool]) -> None:
        """Write what is there after a power loss: `kept` says of each pending change whether."""
        _write(self.root, target, kept)

    def _find(self, path: str) -> Inode | None:
        inode: Inode | None = self.root
        for part in Path(path).relative_to(self._base).parts:
            inode = inode.live.get(part) if inode else None
        return inode

    def _parent(self, path: str) -> tuple[Inode, str]:
        parent = self._find(str(Path(path).parent))
        assert parent is not None, path
        return parent, Path(path).name


def _name(parent: Inode, name: str, inode: Inode | None) -> None:
    if inode is None:
        parent.live.pop(name, None)
    else:
        parent.live[name] = inode
    parent.pending.append((name, inode))


def _settle(inode: Inode, kept: Callable[[Inode], bool]) -> None:
    """Make durable what `kept` keeps of the pending changes, and forget them all."""
    if inode.names is None:
        inode.content = _content(inode, kept)
    else:
        inode.names = _names(inode, kept)
    inode.pending.clear()


def _content(inode: Inode, kept: Callable[[Inode], bool]) -> bytes:
    found = bytearray(inode.content)
    for offset, data in inode.pending:
        if data is None:
            if kept(inode):
                del found[offset:]
                found.extend(bytes(offset - len(found)))
            continue
        for start in range(0, len(data), SECTOR):
            if kept(inode):
                piece, at = data[start : start + SECTOR], offset + start
                found.extend(bytes(max(0, at - len(found))))
                found[at : at + len(piece)] = piece
    return bytes(found)


def _names(inode: Inode, kept: Callable[[Inode], bool]) -> dict[str, Inode]:
    assert inode.names is not None
    found = dict(inode.names)
    for name, other in inode.pending:
        if not kept(inode):
            continue
        if other is None:
            found.pop(name, None)
        else:
            found[name] = other
    return found


def _read(path: Path) -> Inode:
    if path.is_file():
        return Inode(path.read_bytes())
    children = {p.name: _read(p) for p in path.iterdir() if not p.name.endswith("-shm")}
    return Inode(names=children, live=dict(children))


def _write(inode: Inode, path: Path, kept: Callable[[Inode], bool]) -> None:
    if inode.names is None:
        path.write_bytes(_content(inode, kept))
        return
    path.mkdir()
    for name, child in _names(inode, kept).items():
        _write(child, path / name, kept)


def nothing(inode: Inode) -> bool:
    """All that was not synced is lost."""
    del inode
    return False


def names_only(inode: Inode) -> bool:
    """Every name is there, and no byte that was not synced: a file may be empty."""
    return inode.names is not None


def some(seed: int) -> Callable[[Inode], bool]:
    """Any half of it, by sectors."""
    chance = random.Random(seed)
    return lambda inode: chance.random() < 0.5
