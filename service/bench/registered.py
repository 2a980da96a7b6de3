"""What adapters cost that nobody asks for now.

    growth    the same eight requests to servers with 1, 10, 100 and 1,000 registered adapters
    resident  requests to one adapter, and spread over 32; all are in their slots
    zipf      requests over 1,000 adapters by Zipf's law, with memory for 32

The last two in one process, on one base, in turns. Each request looks its adapter up by name in a
real store, as the server does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapters.store import AdapterStore
from base.kernels import Precision
from base.load import Base, load_base
from service.bench.growth import Asked, measure_growth
from service.bench.turns import Cost, Figures, Try, beside, in_turns
from service.bench.zipf import Scene, add, running, serve, traffic
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.request import AdapterRef
from service.fetch import Fetch

REGISTERED = "registered adapters"  # the name of this part, for --only
COUNTS = (1, 10, 100, 1000)
GROWTH_ROUNDS = 3  # after each start of the servers; of some seconds each
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """The many are small, so that a thousand fit on the disk; the resident ones are large.
    `counts` rises, and has two at least."""

    model: Path
    precision: Precision
    threads: int
    rounds: int
    rank: int  # of the resident ones, on all linear layers
    counts: tuple[int, ...] = COUNTS
    growth_rounds: int = GROWTH_ROUNDS
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


def measure(setting: Setting) -> Figures:
    """The three parts, one after the other."""
    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory(prefix="nibble-registered-") as scratch:
        base = _base(setting)
        homes = _homes(setting, base, Path(scratch))
        growth = _growth(setting, base, homes)
        own, large = Path(scratch) / "resident", setting.large(base)
        _fill(own, base, large)
        with _store(own) as store, _engine(base, store, setting.clients) as engine:
            resident = _resident(setting, engine, store, large)
        with _store(dict(homes)[setting.counts[-1]]) as store:
            zipf = _zipf(setting, store)
    return {"growth": growth, "resident": resident, "zipf": zipf}


def _base(setting: Setting) -> Base:
    """A new one: an engine has a base for itself."""
    return load_base(setting.model, device="cpu", precision=setting.precision, lean=True)


def _homes(setting: Setting, base: Base, scratch: Path) -> list[tuple[int, Path]]:
    """A server's home for each count; the last is the fewest again: what chance does to a ratio."""
    counts = (*setting.counts, setting.counts[0])
    homes = [(count, scratch / f"home-{place}") for place, count in enumerate(counts)]
    for count, home in homes:
        _fill(home, base, setting.scene(count))
    return homes


def _growth(setting: Setting, base: Base, homes: Sequence[tuple[int, Path]]) -> list[Figures]:
    """The adapter that is asked for is the same one in every home, and in its slot."""
    return measure_growth(
        setting.model,
        homes,
        ["--precision", setting.precision],
        {"OMP_NUM_THREADS": str(setting.threads)},
        Asked("many-0", base.spec.vocab_size, setting.clients),
        setting.growth_rounds,
    )


def _resident(setting: Setting, engine: Engine, shelf: AdapterStore, scene: Scene) -> Figures:
    """Tokens/s of requests spread over many large adapters, over that of requests to one."""
    names = [f"many-{number}" for number in range(scene.registered)]
    tries = [_asking(engine, shelf, scene, some) for some in (names[:1], names)]
    one, many = in_turns(tries, setting.rounds)
    tokens = 2 * scene.requests * scene.new_tokens  # of both turns
    return {
        "adapters": scene.registered,
        "rank": scene.rank,
        "one_tokens_per_second": _rate(tokens, one),
        "many_tokens_per_second": _rate(tokens, many),
        **beside(one, many),
    }


def _rate(tokens: int, costs: Sequence[Cost]) -> float:
    return round(tokens / statistics.median(cost.wall for cost in costs), 2)


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


def _fill(home: Path, base: Base, scene: Scene) -> None:
    """A home with the scene's adapters: many-0 and on, the same ones in every home."""
    home.mkdir()
    chance = torch.Generator().manual_seed(0)
    with _store(home) as store:
        for number in range(scene.registered):
            add(f"many-{number}", scene, base.spec, store, home, chance, confined=False)


@contextmanager
def _store(home: Path) -> Iterator[AdapterStore]:
    """The store of a home, where `nibble serve --home` looks for it."""
    with closing(AdapterStore(str(home / "blobs"), str(home / "catalog.db"))) as store:
        yield store


@contextmanager
def _engine(base: Base, store: AdapterStore, clients: int) -> Iterator[Engine]:
    config = EngineConfig(max_sequences=clients, kv_cache_bytes=64 * MIB)
    engine = Engine(base, Fetch(store, base), config)
    with running(engine):
        yield engine


def _asking(engine: Engine, store: AdapterStore, scene: Scene, names: Sequence[str]) -> Try:
    """Ask the scene's requests of these adapters, which are put into their slots now."""

    def find(name: str) -> AdapterRef:
        return AdapterRef.of(store.resolve(name))

    for name in names:
        engine.load(find(name))

    def ask(number: int) -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        traffic(engine, scene, names, find, number)
        return Cost(time.perf_counter() - wall, time.process_time() - cpu)

    return ask
