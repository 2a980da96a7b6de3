"""Ctrl-C and SIGTERM while training: end after the running step, with everything kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupts(once: bool = True) -> Iterator[Callable[[], bool]]:
    """Within it, the function that it gives says whether somebody asked to stop.

    A second signal does what it always did; not with `once=False`, where whoever started this
    process among others hands the same Ctrl-C on to it. Outside the main thread nothing is caught.
    """
    asked = threading.Event()
    before: dict[int, Any] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        asked.set()
        if once:
            signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, catch)
    try:
        yield asked.is_set
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)
