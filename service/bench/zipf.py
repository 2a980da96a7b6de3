"""Many registered adapters under Zipf traffic, with memory for a few: one measurement, one process.

Requests choose adapter k of N with probability proportional to 1/k (Zipf's law with exponent 1), a
fixed number of clients asks one request after another, and both tiers in memory hold `resident`
adapters. The adapters are random LoRAs, registered in a real store: each passes every check of an
upload. The checks run in this process and not in a child for each, since nobody else's files are
read here; what the child costs is measured apart, on a few.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapters.delta import LoweredAdapter
from adapters.limits import Limits
from adapters.lowering import lower
from adapters.manifest import AdapterManifest
from adapters.store import CONFIG_FILE, WEIGHTS_FILE, AdapterStore
from adapters.validation_child import validate_here, validate_in_child
from base.load import Base, load_base
from base.spec import BaseSpec
from service.bench.memory import resident
from service.bench.random_adapters import random_adapter
from service.bench.report import percentile
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.observer import Silent
from service.engine.request import AdapterKey, AdapterRef, Request, Sampling, Token
from service.errors import Overloaded

UPLOADS = 5  # registered through a child each, to know what that costs
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scene:
    """What is measured: how many adapters, what traffic, which budget."""

    model: Path
    registered: int
    resident: int  # adapters that each tier in memory has room for
    requests: int
    clients: int
    prompt_tokens: int
    new_tokens: int
    rank: int
    modules: tuple[str, ...]  # last names of the layers that the LoRAs are on
    threads: int
    exponent: float = 1.0  # of Zipf's law; 0 chooses all alike
    warm: bool = False  # all adapters are in their slots before the first request


@dataclass(slots=True)
class Ear(Silent):
    """Keeps what the engine tells of adapters."""

    sought: Counter[str] = field(default_factory=Counter)
    loads: list[float] = field(default_factory=list)
    evicted: Counter[str] = field(default_factory=Counter)

    def adapter_sought(self, name: str, tier: str) -> None:
        self.sought[tier] += 1

    def adapter_loaded(self, key: AdapterKey, seconds: float, nbytes: int, queued: float) -> None:
        self.loads.append(seconds)

    def adapter_evicted(self, digest: str, tier: str) -> None:
        self.evicted[tier] += 1


def scenes(common: Scene, registered: Sequence[int]) -> list[Scene]:
    """Zipf's traffic over so many adapters; then one resident adapter against as many as fit."""
    rows = [replace(common, registered=number) for number in registered]
    warm = replace(common, registered=1, warm=True, exponent=0.0)
    return [*rows, warm, replace(warm, registered=common.resident)]


def measure(scene: Scene) -> Figures:
    """All figures of one scene. Call it in a process of its own: memory is the process's."""
    torch.set_num_threads(scene.threads)
    base = load_base(scene.model, device="cpu", dtype="auto")
    with tempfile.TemporaryDirectory(prefix="nibble-zipf-") as scratch:
        store = AdapterStore(f"{scratch}/blobs", f"{scratch}/catalog.sqlite")
        try:
            manifests, cost = register(scene, base.spec, store, Path(scratch))
            traffic = serve(scene, base, store, manifests)
        finally:
            store.close()
    kept = {key: value for key, value in asdict(scene).items() if key not in ("model", "modules")}
    return kept | {"modules": list(scene.modules), "cost": cost, **traffic}


def register(
    scene: Scene, spec: BaseSpec, store: AdapterStore, scratch: Path
) -> tuple[list[AdapterManifest], Figures]:
    """Fill the store. What one more adapter costs: seconds, bytes on disk, bytes of memory."""
    chance = torch.Generator().manual_seed(0)
    child = [
        add(f"upload-{number}", scene, spec, store, scratch, chance, confined=True)[1]
        for number in range(UPLOADS)
    ]
    for number in range(UPLOADS):
        store.delete(f"upload-{number}")
    disk, memory = _disk(scratch), resident().anonymous
    added = [
        add(f"zipf-{number}", scene, spec, store, scratch, chance, confined=False)
        for number in range(scene.registered)
    ]
    seconds = [each for _, each in added]
    cost = {
        "seconds": round(percentile(seconds, 0.5), 4),
        "seconds_with_child": round(percentile(child, 0.5), 4),
        "disk_bytes": (_disk(scratch) - disk) // scene.registered,
        "weights_bytes": added[0][0].weights_bytes,
        "rss_bytes": (resident().anonymous - memory) // scene.registered,
        "slot_bytes": added[0][0].memory_bytes,
    }
    return [manifest for manifest, _ in added], cost


def add(
    name: str,
    scene: Scene,
    spec: BaseSpec,
    store: AdapterStore,
    scratch: Path,
    chance: torch.Generator,
    *,
    confined: bool,
) -> tuple[AdapterManifest, float]:
    """One random adapter, registered; the seconds that the store took."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="made-") as made:
        directory = random_adapter(Path(made) / name, spec, scene.rank, chance, scene.modules)
        config = (directory / CONFIG_FILE).read_bytes()
        check = validate_in_child if confined else validate_here
        weights = directory / WEIGHTS_FILE
        begun = time.perf_counter()
        found = store.add(name, config, weights, None, spec, Limits(), check=check)
        return found, time.perf_counter() - begun


def serve(
    scene: Scene, base: Base, store: AdapterStore, manifests: Sequence[AdapterManifest]
) -> Figures:
    """Run the traffic; throughput, where adapters were found, how long the cold ones took."""

    def fetch(ref: AdapterRef) -> LoweredAdapter:
        manifest = store.pinned(ref.digest)
        return lower(manifest, store.weights_path(manifest), base)

    refs = [AdapterRef(manifest.digest, manifest.name) for manifest in manifests]
    by_name = {ref.name: ref for ref in refs}
    each = max(fetch(refs[0]).nbytes, 1)
    budget = scene.resident * each
    ear = Ear()
    config = EngineConfig(host_cache_bytes=budget, slot_bytes=budget, max_sequences=scene.clients)
    engine = Engine(base, fetch, config, ear)
    with running(engine):
        for ref in refs if scene.warm else refs[:1]:
            engine.load(ref)
        _ask(engine, scene, refs[0], random.Random(1))  # the first step of all is slower
        ear.sought.clear()
        ear.loads.clear()
        ear.evicted.clear()
        begun, processor = time.perf_counter(), time.process_time()
        asked = traffic(engine, scene, list(by_name), by_name.__getitem__)
        seconds, processor = time.perf_counter() - begun, time.process_time() - processor
        memory, held = resident(), engine.residents()
    return {
        "adapter_bytes": each,
        "budget_bytes": budget,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(processor, 3),
        "tokens_per_second": round(scene.requests * scene.new_tokens / seconds, 2),
        "found": {tier: ear.sought[tier] for tier in ("slot", "host", "store")},
        "hit_rate": round(1 - ear.sought["store"] / scene.requests, 4),
        "cold_loads": len(ear.loads),
        "cold_load_ms": _milliseconds(ear.loads),
        "evicted": dict(ear.evicted),
        "first_token_ms": _milliseconds(asked.first),
        "refused": asked.refused,
        "distinct": asked.distinct,
        "resident_bytes": sum(one.nbytes for one in held if one.tier == "slot"),
        "rss_bytes": memory.rss,
        "peak_rss_bytes": memory.peak_rss,
    }


@dataclass(slots=True)
class Asked:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)  # seconds to the first token
    refused: int = 0  # times that a client was told to come again
    distinct: int = 0  # adapters that were asked for


def traffic(
    engine: Engine,
    scene: Scene,
    names: Sequence[str],
    find: Callable[[str], AdapterRef],
    number: int = 0,
) -> Asked:
    """`clients` threads work off one list of requests; all wait for its end.

    Each request finds its adapter by name first, as a server does. Traffic of another `number` has
    other prompts, or the prefix cache would answer.
    """
    picked = choices(len(names), scene.requests, scene.exponent)
    asked, lock, todo = Asked(distinct=len(set(picked))), threading.Lock(), iter(enumerate(picked))
    faults: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    place, which = next(todo)
                chance = random.Random(f"{number} {place}")
                first, refused = _ask(engine, scene, find(names[which]), chance)
                with lock:
                    asked.first.append(first)
                    asked.refused += refused
        except StopIteration:
            pass
        except BaseException as error:
            faults.append(error)

    clients = [threading.Thread(target=work) for _ in range(scene.clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if faults:
        raise faults[0]
    return asked


def _ask(engine: Engine, scene: Scene, ref: AdapterRef, chance: random.Random) -> tuple[float, int]:
    """One request to its end: seconds to its first token, and how often it was refused."""
    vocabulary = engine.base.spec.vocab_size
    low = min(16, vocabulary // 2)
    prompt = tuple(chance.randrange(low, vocabulary) for _ in range(scene.prompt_tokens))
    new = scene.new_tokens
    sampling = Sampling(max_new_tokens=new, min_new_tokens=new, ignore_eos=True)
    begun, refused = time.perf_counter(), 0
    while True:
        try:
            stream = engine.submit(Request(ref.name, prompt, sampling, ref))
            break
        except Overloaded as full:
            refused += 1
            time.sleep(full.retry_after)
    times = [time.perf_counter() for event in stream.iterate() if isinstance(event, Token)]
    assert len(times) == new, f"{ref.name}: {len(times)} tokens of {new}"
    return times[0] - begun, refused


def choices(adapters: int, requests: int, exponent: float) -> list[int]:
    """Which adapter each request names: Zipf's law, the same for the same arguments."""
    weights = [1 / (place + 1) ** exponent for place in range(adapters)]
    return random.Random(f"{adapters} {exponent}").choices(range(adapters), weights, k=requests)


@contextmanager
def running(engine: Engine) -> Iterator[None]:
    engine.start()
    try:
        yield
    finally:
        engine.stop()


def _milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        "p50": round(1000 * percentile(seconds, 0.5), 2),
        "p99": round(1000 * percentile(seconds, 0.99), 2),
    }


def _disk(directory: Path) -> int:
    """Bytes that the files below take on the disk."""
    found = (os.path.join(where, name) for where, _, names in os.walk(directory) for name in names)
    return sum(os.stat(path).st_blocks * 512 for path in found)
