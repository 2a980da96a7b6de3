"""This server's engine, as `nibble serve` assembles it, without HTTP."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from adapters.limits import Limits
from adapters.store import CONFIG_FILE, WEIGHTS_FILE, AdapterStore
from adapters.validation_child import validate_here
from base.kernels import native_status
from base.load import load_base
from base.spec import BaseSpec
from service.bench.dense_twin import dense_twin
from service.bench.dictation import Dictation
from service.bench.memory import embedding_bytes, head_bytes, quantised_bytes, resident
from service.bench.peer import Setup
from service.bench.scenario import Job, Round, round_of
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.observer import Silent, StepReport
from service.engine.request import AdapterRef, Request, Sampling, Token
from service.engine.stream import Stream
from service.fetch import Fetch

ENGINE = "engine"
LOOKUP = "engine, prompt lookup"
DRAFT = 8  # tokens that one step may guess


class _Steps(Silent):
    """An observer that counts steps by whether a captured one was replayed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def stepped(self, report: StepReport) -> None:
        if report.prompt_tokens or report.generated_tokens:
            self.counts["replayed" if report.replayed else "eager"] += 1


class NibblePeer:
    """Base, store and engine; every adapter is in its slot before the first round."""

    def __init__(self, setup: Setup) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="nibble-bench-")
        options = setup.options
        device, dense = options.get("device", "cpu"), options.get("dense", False)
        self._base = load_base(
            setup.model,
            device=device,
            dtype=options.get("dtype", "auto"),
            precision=options.get("precision", "exact"),
            lean=device == "cpu" and not dense,
        )
        if dense:
            self._base = dense_twin(self._base)
        self._nf4_bytes = quantised_bytes(self._base)
        self._embedding_bytes = embedding_bytes(self._base)
        where = Path(self._directory.name)
        self._store = AdapterStore(str(where / "blobs"), str(where / "catalog.sqlite"))
        self._refs = [self._add(directory) for directory in setup.adapters]
        self._steps = _Steps()
        limits = EngineConfig(**options.get("engine", {}))
        self._engine = Engine(self._base, Fetch(self._store, self._base), limits, self._steps)
        self._engine.start()
        self._loaded = [self._engine.load(ref) for ref in self._refs]
        self._asked = 0

    def run(self, job: Job, way: str) -> Round:
        assert way in (ENGINE, LOOKUP), way
        times: list[list[float]] = [[] for _ in job.prompts]
        requests = self._requests(job, way)
        arrival = time.perf_counter()
        streams = [self._engine.submit(request) for request in requests]
        readers = [
            threading.Thread(target=_read, args=pair) for pair in zip(streams, times, strict=True)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert {len(each) for each in times} == {job.new_tokens}
        return round_of(arrival, times)

    def spec(self) -> BaseSpec:
        return self._base.spec

    def steps(self) -> dict[str, int]:
        """How many steps since the last question were replayed, and how many were not."""
        counts, self._steps.counts = self._steps.counts, Counter()
        return dict(counts)

    def facts(self) -> dict[str, Any]:
        memory = resident()
        return {
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "kernels": native_status(),
            "precision": self._base.precision,
            "rss_bytes": memory.rss,
            "anonymous_bytes": memory.anonymous,
            "peak_rss_bytes": memory.peak_rss,
            "nf4_bytes": self._nf4_bytes,
            "embedding_bytes": self._embedding_bytes,
            "kv_cache_bytes": self._engine.kv_cache_bytes,
            "adapter_bytes": sum(report.nbytes for report in self._loaded),
            "each_adapter_bytes": [report.nbytes for report in self._loaded],
            "step_bytes": self._nf4_bytes + head_bytes(self._base),
            "token_bytes": self._engine.config.token_bytes(self._base),
            "arithmetic": "int8" if self._base.precision == "fast" else "float32",
        }

    def close(self) -> None:
        self._engine.stop()
        self._store.close()
        self._directory.cleanup()

    def _add(self, directory: Path) -> AdapterRef:
        manifest = self._store.add(
            directory.name,
            (directory / CONFIG_FILE).read_bytes(),
            directory / WEIGHTS_FILE,
            None,
            self._base.spec,
            Limits(),
            check=validate_here,  # nobody else's files, so no child for each
        )
        return AdapterRef.of(manifest)

    def _requests(self, job: Job, way: str) -> list[Request]:
        self._asked += 1
        new, adapters = job.new_tokens, job.scenario.adapters
        return [
            Request(
                id=f"{self._asked}.{at}",
                prompt=prompt,
                sampling=Sampling(
                    max_new_tokens=new,
                    min_new_tokens=new,
                    ignore_eos=True,
                    guide=Dictation(job.answers[at]).guide() if job.answers else None,
                ),
                adapter=None if adapter is None else self._refs[adapter],
                prompt_lookup_num_tokens=DRAFT if way == LOOKUP else 0,
                tenant=way,  # which may not find in the prefix cache what another way computed
            )
            for at, (prompt, adapter) in enumerate(zip(job.prompts, adapters, strict=True))
        ]


def _read(stream: Stream, times: list[float]) -> None:
    times += [time.perf_counter() for event in stream.iterate() if isinstance(event, Token)]
