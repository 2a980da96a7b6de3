"""Cold adapters on their way from the store to memory: a bounded queue, worked off by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from adapters.delta import LoweredAdapter
from adapters.lowering.shared import interned
from service.engine.request import AdapterKey, AdapterRef
from service.errors import ColdLoads

Fetch = Callable[[AdapterRef], LoweredAdapter]  # store → lowered, in a worker thread
CPU = torch.device("cpu")
SMOOTHING = 0.2


@dataclass(slots=True, eq=False)
class Load:
    """One adapter that was asked for. Times by time.perf_counter; 0.0: not yet."""

    ref: AdapterRef
    asked: float
    begun: float = 0.0
    ended: float = 0.0
    adapter: LoweredAdapter | None = None  # when it has arrived; where lowering put it
    cached: LoweredAdapter | None = None  # the same in main memory
    error: str | None = None  # when it could not be loaded; neither: nobody wanted it any more


class Loads:
    """One load for each adapter, however many ask for it. Any thread may ask."""

    def __init__(
        self,
        fetch: Fetch,
        ended: Callable[[Load], None],
        wanted: Container[AdapterKey],
        *,
        most: int,
        workers: int,
        on_cpu: bool = True,
    ) -> None:
        """`ended` is called in a worker's thread; a load whose key is not `wanted` when its turn
        comes is not begun. `most` loads may be under way before newcomers are refused."""
        self.most = most
        self._fetch = fetch
        self._ended = ended
        self._wanted = wanted
        self._workers = workers
        self._on_cpu = on_cpu
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="nibble-adapters")
        self._lock = threading.Lock()
        self._loads: dict[AdapterKey, Load] = {}
        self._seconds = 0.5  # smoothed duration of a load

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._loads

    def items(self) -> list[tuple[AdapterKey, Load]]:
        with self._lock:
            return list(self._loads.items())

    def ask(self, ref: AdapterRef, *, bounded: bool = False) -> None:
        """Have the adapter loaded, if it is not under way. Raises ColdLoads where it is `bounded`
        and too many others are: a request that was accepted is not bounded any more."""
        with self._lock:
            if ref.key in self._loads:
                return
            if bounded and len(self._loads) >= self.most:
                raise ColdLoads(
                    f"{len(self._loads)} adapters are being loaded, {self.most} may: "
                    f"{ref.name!r} is not in memory and cannot wait for them",
                    retry_after=len(self._loads) * self._seconds / self._workers,
                )
            load = self._loads[ref.key] = Load(ref, time.perf_counter())
        self._pool.submit(self._run, load)

    def take(self, load: Load) -> bool:
        """The load has ended: it is not under way any more. False where it was forgotten."""
        with self._lock:
            if self._loads.get(load.ref.key) is not load:
                return False
            del self._loads[load.ref.key]
            if load.adapter is not None:
                self._seconds += SMOOTHING * (load.ended - load.begun - self._seconds)
            return True

    def forget(self, digest: str) -> None:
        with self._lock:
            for key in [key for key in self._loads if key.digest == digest]:
                del self._loads[key]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, load: Load) -> None:
        load.begun = time.perf_counter()
        if load.ref.key in self._wanted:
            try:
                found = self._fetch(load.ref)
                load.cached = interned(found.to(CPU))
                load.adapter = load.cached if self._on_cpu else found
            except Exception as error:
                load.error = str(error) or type(error).__name__
        load.ended = time.perf_counter()
        self._ended(load)
