"""To wait for what another thread or process does, however busy the machine is: never a sleep.

And time without a clock, for what sleeps and has deadlines by itself.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

PATIENCE = 120.0  # seconds, for whatever must happen at all
T = TypeVar("T")


def until(condition: Callable[[], object], within: float = PATIENCE) -> None:
    """Wait for a condition; fail when it does not come true."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def simulated(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on a loop whose time passes only while nothing is to be done: who sleeps
    for an hour is awake at once, and no deadline passes for a busy machine. No threads."""
    with asyncio.Runner(loop_factory=_Simulated) as runner:
        return runner.run(work)


# In the place of a module's `time`: that of the loop which runs.
LOOP_TIME = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())


class _Simulated(asyncio.SelectorEventLoop):
    now = 0.0

    def __init__(self) -> None:
        super().__init__(_Leap(self))

    def time(self) -> float:
        return self.now


class _Leap(selectors.SelectSelector):
    def __init__(self, loop: _Simulated) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(timeout if timeout is None else 0)
        if not ready and timeout:
            self._loop.now += timeout
        return ready
