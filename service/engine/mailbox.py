"""Commands for the engine's thread, from all others: run there, between two steps."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from service.errors import EngineFailed

T = TypeVar("T")
Command = Callable[[], None]


class Mailbox:
    """Any thread posts; the engine's thread takes."""

    def __init__(self, reader: threading.Thread, fault: Callable[[], str | None]) -> None:
        """`fault` says why the reader has ended, when it did not end well."""
        self._reader = reader
        self._fault = fault
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def post(self, command: Command) -> None:
        self._commands.put(command)

    def wake(self) -> None:
        """Have the engine look again at what others have changed."""
        self._commands.put(lambda: None)

    def ask(self, question: Callable[[], T]) -> T:
        """Run it in the engine's thread between two steps and return its answer."""
        if not self._reader.is_alive():
            return question()
        answer: Future[T] = Future()

        def reply() -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        self._commands.put(reply)
        return self.wait(answer)

    def wait(self, answer: Future[T], timeout: float = math.inf) -> T:
        """The future's result, or EngineFailed when nobody is left to give it."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return answer.result(timeout=min(1.0, deadline - time.monotonic()))
            except TimeoutError:
                if not self._reader.is_alive() and not answer.done():
                    raise EngineFailed(self._fault() or "the engine has stopped") from None
                if time.monotonic() >= deadline:
                    raise

    def run_all(self) -> None:
        """Engine thread: run what has come."""
        with suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def run_next(self, timeout: float | None) -> None:
        """Engine thread: wait for a command, at most `timeout` seconds, and run it."""
        with suppress(queue.Empty):
            self._commands.get(timeout=timeout)()
