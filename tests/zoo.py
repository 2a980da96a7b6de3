"""A small zoo for engine tests: adapters on disk, a fetch function over them, recorded logits."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapters.delta import LoweredAdapter
from adapters.lowering import lower
from adapters.manifest import AdapterManifest
from base.load import Base
from service.engine.batch import Batch
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.model_runner import Resident
from service.engine.request import AdapterRef, Finished, Request, Sampling, Token
from service.engine.stream import Stream
from tests.oracle import PeftOracle, make_adapter, read_manifest, relative_error
from tests.waiting import PATIENCE


@dataclass(slots=True)
class Specimen:
    """One adapter as it was saved, and how it is to be served."""

    directory: Path
    manifest: AdapterManifest

    def ref(self) -> AdapterRef:
        return AdapterRef.of(self.manifest)


def specimen(directory: Path, base: Base, **fields: Any) -> Specimen:
    """The adapter that PEFT saved in `directory`; `fields` as of its manifest."""
    return Specimen(directory, read_manifest(directory, base.spec, base.tokenizer, **fields))


@dataclass(slots=True)
class Zoo:
    """A base, its adapters, and the oracle of each."""

    source: Path
    base: Base
    specimens: list[Specimen] = field(default_factory=list)
    _oracles: dict[Any, PeftOracle] = field(default_factory=dict)

    @classmethod
    def populate(cls, source: Path, base: Base, home: Path, targets: Any = None) -> Zoo:
        """LoRA of several ranks and targets, rsLoRA, DoRA; some of them merged."""
        zoo = cls(source, base)
        kinds: list[tuple[str, int, Mapping[str, Any]]] = [
            ("lora", 1, {}),
            ("lora", 8, {"targets": ["q_proj", "v_proj"]}),
            ("lora", 16, {"alpha": 8}),
            ("rslora", 4, {}),
            ("dora", 4, {}),
            ("dora", 8, {"targets": ["down_proj", "k_proj"]}),
        ]
        for number, (kind, rank, options) in enumerate(kinds):
            where = home / f"{kind}-{number}"
            make_adapter(where, source, kind, rank=rank, seed=number, **options)
            zoo.specimens.append(specimen(where, base))
        for number, dtype in ((0, "float32"), (4, "float32"), (2, "bfloat16")):
            twin = zoo.specimens[number]
            zoo.specimens.append(
                Specimen(
                    twin.directory,
                    replace(
                        twin.manifest,
                        name=f"{twin.manifest.name}-{dtype}",
                        placement="merged",
                        merged_dtype=dtype,
                    ),
                )
            )
        return zoo

    def fetch(self, ref: AdapterRef) -> LoweredAdapter:
        """What the app does with the store: digest → weights → deltas."""
        found = self.named(ref.name)
        assert found.manifest.digest == ref.digest
        return lower(found.manifest, found.directory / "adapter_model.safetensors", self.base)

    def named(self, name: str) -> Specimen:
        return next(s for s in self.specimens if s.manifest.name == name)

    def oracle(self, name: str | None) -> PeftOracle:
        """PEFT with this adapter alone; for merged bf16 with the weights rounded as stated."""
        if name not in self._oracles:
            found = self.named(name) if name else None
            merged = None
            if found and found.manifest.placement == "merged":
                merged = found.manifest.merged_dtype
            directory = found.directory if found else None
            self._oracles[name] = PeftOracle(self.base, directory, merged=merged)
        return self._oracles[name]


class Recorder:
    """Keeps the logits row of every sampled position, by request and position. The engine's thread
    adds to them while a test reads."""

    def __init__(self, engine: Engine) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, dict[int, torch.Tensor]] = {}
        self._run = engine._runner.run
        self._vocabulary = engine.base.spec.vocab_size
        engine._runner.run = self.run  # type: ignore[method-assign]

    def run(self, batch: Batch, adapters: Resident) -> torch.Tensor:
        logits = self._run(batch, adapters)
        starts = batch.query_start.tolist()
        for row, (place, owner) in enumerate(
            zip(batch.logit_rows.tolist(), batch.logit_chunks, strict=True)
        ):
            chunk = batch.chunks[owner]
            position = chunk.start + place - starts[owner]
            own = chunk.sequence.vocabulary or self._vocabulary
            with self._lock:
                rows = self._rows.setdefault(chunk.sequence.request.id, {})
                rows[position] = logits[row, :own].clone()
        return logits

    def rows(self, request_id: str) -> dict[int, torch.Tensor]:
        """Position -> row, of one request so far: a copy, to which nothing is added."""
        with self._lock:
            return dict(self._rows.get(request_id, {}))

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()


def start(base: Base, zoo: Zoo | None = None, *, fetch: Any = None, **limits: Any) -> Engine:
    """A running engine with small limits, over the adapters of `zoo` or of `fetch`."""
    given = {"kv_cache_bytes": 1 << 22, "max_step_tokens": 64, **limits}
    engine = Engine(base, fetch or (zoo.fetch if zoo else _nothing), EngineConfig(**given))
    engine.start()
    return engine


def _nothing(ref: AdapterRef) -> LoweredAdapter:
    raise LookupError(f"no adapter {ref.name!r} here")


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Within it the engine stands between two steps: what is submitted meanwhile is all there when
    the next one begins, whatever thread has the processor."""
    stands, go = threading.Event(), threading.Event()

    def stand() -> None:
        stands.set()
        go.wait(PATIENCE)

    engine._mailbox.post(stand)
    assert stands.wait(PATIENCE)
    try:
        yield
    finally:
        go.set()


@contextmanager
def slowly(engine: Engine, seconds: float = 0.05) -> Iterator[None]:
    """Within it a step takes so long at least, so that what runs is still running when another
    thread comes to look at it."""
    over, step = threading.Event(), engine._step

    def slow() -> None:
        step()
        over.wait(seconds)

    engine._step = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine._step = step  # type: ignore[method-assign]
        over.set()


def collect(stream: Stream, timeout: float = PATIENCE) -> tuple[list[Token], list[Finished]]:
    """All events of one request."""
    tokens: list[Token] = []
    ends: list[Finished] = []
    for event in stream.iterate(timeout):
        if isinstance(event, Token):
            tokens.append(event)
        else:
            ends.append(event)
    return tokens, ends


def greedy(
    ident: str, prompt: list[int], ref: AdapterRef | None = None, new: int = 8, **sampling: Any
) -> Request:
    """A greedy request of exactly `new` tokens."""
    options = Sampling(max_new_tokens=new, ignore_eos=True, **sampling)
    return Request(ident, tuple(prompt), options, ref)


def random_prompt(rng: random.Random, vocabulary: int, longest: int) -> list[int]:
    """1 to `longest` tokens, short ones as likely as long ones; never 0, which pads some bases."""
    length = max(1, int(longest ** rng.random()))
    return [rng.randrange(1, vocabulary) for _ in range(length)]


def assert_equals_oracle(
    oracle: PeftOracle,
    prompt: list[int],
    output: list[int],
    rows: Mapping[int, torch.Tensor],
    tolerance: float = 1e-4,
) -> None:
    """Each output token is the oracle's greedy choice after the tokens before it, and each logits
    row is within `tolerance` of the oracle's, relative to its largest logit.

    One forward pass over prompt and output: by induction the same as PEFT's own greedy loop. Where
    the oracle's two best logits are closer than the tolerance, either of them is right.
    """
    want = oracle.logits([*prompt, *output])
    for i, token in enumerate(output):
        position = len(prompt) - 1 + i
        row = want[position]
        error = relative_error(rows[position], row)
        assert error <= tolerance, f"position {position}: relative error {error:.1e}"
        gap = float(row.max() - row[token])
        assert gap <= tolerance * float(row.abs().max()), f"position {position}: token {token}"
