"""Uploads under faults: run with `faults.c` preloaded.

    uploads.py ROOT LIBRARY WORK kills|failures|power STRIDE SEEDS

WORK holds spec.json, adapter_config.json and weights-<n>.safetensors, and takes what is made. One
line of JSON on stdout says what was tried and what was wrong.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv[1])

import alembic.command
import alembic.config  # noqa: F401

from adapters.errors import StoreFull, StoreUnavailable
from adapters.limits import Limits
from adapters.manifest import AdapterManifest
from adapters.store import AdapterStore
from adapters.validation_child import _spec, validate_here
from tests.reliability import disk

LIBRARY = ctypes.CDLL(sys.argv[2])
LIBRARY.disarm.restype = ctypes.c_long
WORK = Path(sys.argv[3])
SPEC = _spec(json.loads((WORK / "spec.json").read_text()))
CONFIG = (WORK / "adapter_config.json").read_bytes()
COUNT, KILL, FAIL = 0, 1, 2
FOR_EVER = 1 << 40
# What one life does: (name, which weights), or (name, None) to delete it.
OPERATIONS: tuple[tuple[str, int | None], ...] = (("a", 1), ("kept", 2), ("a", None), ("b", 1))
State = dict[str, str]  # name -> digest of its newest version


def arm(home: Path, mode: int, at: int = 0, last: int = 0, error: int = 0, log: int = -1) -> None:
    where = os.fsencode(home)
    LIBRARY.arm(where, mode, ctypes.c_long(at), ctypes.c_long(last), error, log)


def open_store(home: Path) -> AdapterStore:
    """As `nibble serve` lays it out."""
    return AdapterStore((home / "blobs").as_uri(), f"sqlite:///{home / 'catalog.db'}")


def upload(store: AdapterStore, name: str, number: int) -> AdapterManifest:
    weights = WORK / f"weights-{number}.safetensors"
    return store.add(name, CONFIG, weights, None, SPEC, Limits(), check=validate_here)


def live(home: Path, acknowledge: Callable[[str], object]) -> None:
    store = open_store(home)
    for name, number in OPERATIONS:
        if number is None:
            store.delete(name)
        else:
            upload(store, name, number)
        acknowledge(name)
    store.close()


def allowed(start: State, digests: dict[int, str], done: int) -> list[State]:
    """What may be seen when `done` operations were acknowledged: the next one is there or not."""
    states, state = [], dict(start)
    for index, (name, number) in enumerate((*OPERATIONS, ("", None))):
        if index >= done:
            states.append(dict(state))
        if number is None:
            state.pop(name, None)
        else:
            state[name] = digests[number]
        if len(states) == 2:
            break
    return states


def wrong_after(home: Path, states: list[State]) -> str | None:
    """Start on what is left: what is wrong there, if anything."""
    store = open_store(home)
    try:
        report = store.sweep(older_than=float("inf"))
        if report.missing:
            return f"half visible: {report.missing}"
        visible = {m.name: m for m in store.list()}
        if {name: m.digest for name, m in visible.items()} not in states:
            return f"visible: {sorted(visible)}, expected one of {[sorted(s) for s in states]}"
        needed = set()
        for name in visible:
            for manifest in store.describe(name).versions:
                store.weights_path(manifest)  # compares its sha-256
                needed.add(manifest.weights_sha256)
        left = {path.name for path in (home / "blobs/blobs").glob("*/*")}
        if left != needed or list((home / "blobs/tmp").iterdir()):
            return f"left behind: {left ^ needed}"
        upload(store, "after", 0)
        return None
    finally:
        store.close()


def prepared(fresh: bool) -> tuple[Path, State, dict[int, str]]:
    """A home to copy, what is visible in it, and the digest of each of the weights."""
    home = WORK / "prepared"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    probe = WORK / "probe"
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir()
    store = open_store(probe)
    digests = {number: upload(store, "x", number).digest for number in range(3)}
    store.close()
    if fresh:
        return home, {}, digests
    store = open_store(home)
    upload(store, "kept", 0)
    store.close()
    return home, {"kept": digests[0]}, digests


def copied(home: Path) -> Path:
    target = WORK / "now"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(home, target)
    return target


def in_child(work: Callable[[], object]) -> int:
    """Its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(stride: int, fresh: bool) -> dict[str, Any]:
    """Killed before each call that changes a file."""
    home, start, digests = prepared(fresh)
    tried, wrong, at = 0, [], 1
    while True:
        now, (reader, writer) = copied(home), os.pipe()

        def life(now: Path = now, writer: int = writer, at: int = at) -> None:
            arm(now, KILL, at)
            live(now, lambda name: os.write(writer, b"."))

        status = in_child(life)
        os.close(writer)
        done = len(os.read(reader, 100))
        os.close(reader)
        if status not in (0, -signal.SIGKILL):
            wrong.append(f"call {at}: ended with {status}")
        found = wrong_after(now, allowed(start, digests, done))
        if found:
            wrong.append(f"killed before call {at}, {done} acknowledged: {found}")
        tried += 1
        if status == 0:
            return {"calls": at, "tried": tried, "wrong": wrong}
        at += stride


def power(stride: int, seeds: int, fresh: bool) -> dict[str, Any]:
    """The log of one life; each prefix of it, with what a power loss then leaves."""
    home, start, digests = prepared(fresh)
    now, path = copied(home), WORK / "log"
    forgetful = disk.Disk(now)
    log = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)

    def life() -> None:
        arm(now, COUNT, log=log)
        live(now, lambda name: LIBRARY.note_text(name.encode()))

    assert in_child(life) == 0
    os.close(log)
    changes, done, tried, wrong = list(disk.read_log(path)), 0, 0, []
    for index, change in enumerate(changes):
        forgetful.apply(change)
        done += change.kind == "!"
        choices = {"nothing": disk.nothing, "names only": disk.names_only}
        choices |= {f"half {s}": disk.some(1000 * index + s) for s in range(seeds)}
        for what, choice in choices.items() if index % stride == 0 or change.kind == "!" else ():
            left = WORK / "left"
            shutil.rmtree(left, ignore_errors=True)
            forgetful.leave(left, choice)
            tried += 1
            try:
                found = wrong_after(left, allowed(start, digests, done))
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if found:
                wrong.append(f"after {index} ({change.kind} {change.path}), {what} kept: {found}")
    return {"changes": len(changes), "tried": tried, "wrong": wrong}


def failures(stride: int) -> dict[str, Any]:
    """Each call fails, once or from there on, as on a full disk, a broken one, or out of files."""
    home, _, _ = prepared(fresh=False)
    tried, wrong = 0, []
    for code in (errno.ENOSPC, errno.EIO, errno.EMFILE):
        for lasting in (False, True):
            at = 1
            while True:
                status = in_child(lambda: _fail_at(copied(home), code, at, lasting))  # noqa: B023
                tried += 1
                if status == 100:  # so many calls are not made
                    break
                if status:
                    many = "from" if lasting else "at"
                    wrong.append(f"{errno.errorcode[code]} {many} call {at}: {status}")
                at += stride
    return {"tried": tried, "wrong": wrong}


def _fail_at(home: Path, code: int, at: int, lasting: bool) -> None:
    store = open_store(home)
    kept = store.resolve("kept")
    store.weights_path(kept)
    files = len(os.listdir("/proc/self/fd"))
    arm(home, FAIL, at, FOR_EVER if lasting else at, code)
    refused = False
    try:
        upload(store, "new", 1)
    except StoreFull:
        refused = True
        assert code == errno.ENOSPC
    except StoreUnavailable:
        refused = True
    calls = LIBRARY.disarm()
    if lasting and refused:
        arm(home, FAIL, 1, FOR_EVER, code)
        assert store.resolve("kept") == kept, "reads go on"
        assert store.weights_path(kept).is_file()
        LIBRARY.disarm()
    visible = {m.name for m in store.list()}
    assert visible == {"kept"} if refused else visible == {"kept", "new"}, visible
    assert len(os.listdir("/proc/self/fd")) <= files, "descriptors leak"
    lock = os.open(home / "blobs/lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
    os.close(lock)
    manifest = upload(store, "new", 2)  # it recovers alone
    assert store.resolve("new") == manifest
    blobs = {path.name for path in (home / "blobs/blobs").glob("*/*")}
    needed = {m.weights_sha256 for name in ("kept", "new") for m in store.describe(name).versions}
    assert blobs == needed, f"blobs that nothing needs: {blobs - needed}"
    temporary = list((home / "blobs/tmp").iterdir())
    assert not temporary or code == errno.EIO, "only a failing unlink leaves a temporary file"
    store.close()
    if calls < at:
        os._exit(100)


def main() -> None:
    what, stride, seeds = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
    modes: dict[str, Callable[[], dict[str, Any]]] = {
        "kills": lambda: kills(stride, fresh=False),
        "fresh kills": lambda: kills(stride, fresh=True),
        "power": lambda: power(stride, seeds, fresh=False),
        "fresh power": lambda: power(stride, seeds, fresh=True),
        "failures": lambda: failures(stride),
    }
    print(json.dumps(modes[what]()))


if __name__ == "__main__":
    main()
