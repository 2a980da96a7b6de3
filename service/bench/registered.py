"""What adapters cost that nobody asks for now: one process, one base, and rounds in turns.

    growth    the same eight requests while 1, 10, 100 or 1,000 adapters are registered
    resident  requests to one adapter, and spread over 32; all are in their slots
    zipf      requests over 1,000 adapters by Zipf's law, with memory for 32

Each request looks its adapter up by name in a real store, as the server does.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapters.delta import LoweredAdapter
from adapters.store import AdapterStore
from base.kernels import Precision
from base.load import Base, load_base
from service.bench.zipf import Figures, Scene, add, running, serve, traffic
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.request import AdapterRef
from service.fetch import Fetch

REGISTERED = "registered adapters"  # the name of this part, for --only
COUNTS = (1, 10, 100, 1000)
MIB = 1 << 20
Try = Callable[[int], float]  # a number that no other call has -> seconds


@dataclass(frozen=True, slots=True)
class Setting:
    """The many are small, so that a thousand fit on the disk; the resident ones are large.
    `counts` rises."""

    model: Path
    precision: Precision
    threads: int
    rounds: int
    rank: int  # of the resident ones, on all linear layers
    counts: tuple[int, ...] = COUNTS
    resident: int = 32
    clients: int = 8
    zipf_requests: int = 96

    def scene(self, registered: int) -> Scene:
        """Of the many."""
        return Scene(
            model=self.model,
            registered=registered,
            resident=self.resident,
            requests=self.clients,
            clients=self.clients,
            prompt_tokens=32,
            new_tokens=16,
            rank=4,
            modules=("q_proj", "v_proj"),
            threads=self.threads,
            exponent=0.0,
        )

    def large(self, base: Base) -> Scene:
        """Of the resident ones: each is asked once, or one of them as often as all."""
        linears = [path for path, shape in base.spec.linears.items() if shape.quantized]
        return replace(
            self.scene(self.resident),
            requests=self.resident,
            rank=self.rank,
            modules=tuple(sorted({path.rpartition(".")[2] for path in linears})),
        )


def measure_apart(setting: Setting) -> Figures:
    """`measure` in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, setting).result()


def measure(setting: Setting) -> Figures:
    """The three parts, one after the other."""
    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory(prefix="nibble-registered-") as scratch, ExitStack() as stack:
        base = _base(setting)
        shelves = [
            stack.enter_context(_shelf(Path(scratch) / str(count), base, setting.scene(count)))
            for count in setting.counts
        ]
        large = setting.large(base)
        own = stack.enter_context(_shelf(Path(scratch) / "resident", base, large))
        with _engine(base, [own, *shelves], setting.clients) as engine:
            growth = _growth(setting, engine, shelves)
            resident = _resident(setting, engine, own, large)
        zipf = _zipf(setting, shelves[-1])
    return {"growth": growth, "resident": resident, "zipf": zipf}


def _base(setting: Setting) -> Base:
    """A new one: an engine has a base for itself."""
    return load_base(setting.model, device="cpu", precision=setting.precision, lean=True)


def _growth(setting: Setting, engine: Engine, shelves: Sequence[AdapterStore]) -> list[Figures]:
    """Time for a token with so many registered, over that with the fewest.

    The adapter that is asked for is the same one in every store, and in its slot.
    """
    scene = setting.scene(1)
    tries = [_asking(engine, shelf, scene, ("many-0",)) for shelf in shelves]
    seconds = _in_turns(tries, setting.rounds + 3)  # short rounds, so more of them
    tokens = scene.requests * scene.new_tokens
    return [
        {
            "registered": count,
            "token_ms": round(1000 * statistics.median(mine) / tokens, 3),
            **_spread(mine, seconds[0]),
        }
        for count, mine in zip(setting.counts, seconds, strict=True)
    ]


def _resident(setting: Setting, engine: Engine, shelf: AdapterStore, scene: Scene) -> Figures:
    """Tokens/s of requests spread over many large adapters, over that of requests to one."""
    names = [f"many-{number}" for number in range(scene.registered)]
    tries = [_asking(engine, shelf, scene, some) for some in (names[:1], names)]
    one, many = _in_turns(tries, setting.rounds)
    tokens = scene.requests * scene.new_tokens
    return {
        "adapters": scene.registered,
        "rank": scene.rank,
        "one_tokens_per_second": round(tokens / statistics.median(one), 2),
        "many_tokens_per_second": round(tokens / statistics.median(many), 2),
        **_spread(one, many),
    }


def _zipf(setting: Setting, store: AdapterStore) -> Figures:
    registered = setting.counts[-1]
    scene = replace(setting.scene(registered), requests=setting.zipf_requests, exponent=1.0)
    manifests = [store.resolve(f"many-{number}") for number in range(registered)]
    found = serve(scene, _base(setting), store, manifests)
    kept = ("tokens_per_second", "hit_rate", "distinct", "cold_load_ms", "first_token_ms")
    return {
        "registered": registered,
        "resident": scene.resident,
        "requests": scene.requests,
        **{key: found[key] for key in kept},
    }


@contextmanager
def _shelf(directory: Path, base: Base, scene: Scene) -> Iterator[AdapterStore]:
    """A store with the scene's adapters: many-0 and on, the same ones in every store."""
    directory.mkdir()
    store = AdapterStore(f"{directory}/blobs", f"{directory}/catalog.sqlite")
    chance = torch.Generator().manual_seed(0)
    try:
        for number in range(scene.registered):
            name = f"many-{number}"
            add(name, scene, base.spec, store, directory, chance, confined=False)
        yield store
    finally:
        store.close()


@contextmanager
def _engine(base: Base, stores: Sequence[AdapterStore], clients: int) -> Iterator[Engine]:
    """An engine that finds an adapter in whichever store has it."""
    homes = {manifest.digest: store for store in stores for manifest in store.list()}

    def fetch(ref: AdapterRef) -> LoweredAdapter:
        return Fetch(homes[ref.digest], base)(ref)

    config = EngineConfig(max_sequences=clients, kv_cache_bytes=64 * MIB)
    engine = Engine(base, fetch, config)
    with running(engine):
        yield engine


def _asking(engine: Engine, store: AdapterStore, scene: Scene, names: Sequence[str]) -> Try:
    """Ask the scene's requests of these adapters, which are put into their slots now."""

    def find(name: str) -> AdapterRef:
        return AdapterRef.of(store.resolve(name))

    for name in names:
        engine.load(find(name))

    def ask(number: int) -> float:
        begun = time.perf_counter()
        traffic(engine, scene, names, find, number)
        return time.perf_counter() - begun

    return ask


def _in_turns(tries: Sequence[Try], rounds: int) -> list[list[float]]:
    """Seconds of each; round 0 warms up, and every other round runs backwards.

    Each call has a number of its own: the same prompts twice, and the prefix cache would answer.
    """
    taken: list[list[float]] = [[] for _ in tries]
    for number in range(rounds + 1):
        places = list(range(len(tries)))
        for place in places if number % 2 else reversed(places):
            seconds = tries[place](number * len(tries) + place)
            if number > 0:
                taken[place].append(seconds)
    return taken


def _spread(over: Sequence[float], under: Sequence[float]) -> Figures:
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {
        "ratio": round(statistics.median(each), 3),
        "lowest": round(min(each), 3),
        "highest": round(max(each), 3),
    }
