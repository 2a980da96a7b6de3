"""Apart: work in a process of its own, whose memory and threads are gone afterwards.

Ctrl-C reaches every process of a terminal. Here only the first hears it, and ends the others by
SIGTERM, which raises SystemExit in them: what they hold, servers and scratch directories, they give
back, and nobody prints where it happened to be.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
ENDING_SECONDS = 5.0


class Ended(Exception):
    """The process is gone without an answer; the message says how it ended."""


def started(work: Callable[..., object], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A new process of `work(pipe, *arguments)`, and the other end of its pipe."""
    context = multiprocessing.get_context("spawn")  # a forked torch would inherit its threads
    pipe, far_end = context.Pipe()
    process = context.Process(target=_run, args=(work, far_end, *arguments), daemon=True)
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what it inherits
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, heard)
    far_end.close()
    return process, pipe


def answer(process: BaseProcess, pipe: Connection) -> Any:
    """What it sends next. Raises Ended; what interrupts the wait ends the process."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        process.join(ENDING_SECONDS)
        raise Ended(f"ended with {process.exitcode}") from None
    except BaseException:
        process.terminate()
        raise


def close(process: BaseProcess, pipe: Connection) -> None:
    """It ends when its pipe does, or it is ended; one that does not care is killed."""
    pipe.close()
    process.join(ENDING_SECONDS)
    for end in (process.terminate, process.kill):
        if process.is_alive():
            end()
            process.join(ENDING_SECONDS)


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in a new process; raises what it raises, and Ended."""
    process, pipe = started(_answer, work, *arguments)
    try:
        fine, result = answer(process, pipe)
    finally:
        close(process, pipe)
    if not fine:
        raise result
    return result  # type: ignore[no-any-return]


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit meanwhile, as Ctrl-C raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _answer(pipe: Connection, work: Callable[..., object], *arguments: Any) -> None:
    try:
        found: tuple[bool, object] = True, work(*arguments)
    except Exception as error:
        found = False, error
    pipe.send(found)


def _run(work: Callable[..., object], pipe: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, _end)
    work(pipe, *arguments)


def _end(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: a second must not cut the end short
    sys.exit(128 + number)
