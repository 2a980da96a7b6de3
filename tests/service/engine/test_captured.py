"""Captured steps without a GPU: a recorder that replays each operation with the tensors it had.

What a replay gives has to be the bits of the same step run as it comes, for any mix of sequences
and adapters that come after the capture; and rows of nobody may touch nobody's blocks.
"""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.delta import LoweredAdapter
from adapters.lowering import lower
from base import kernels
from base.load import Base, load_base
from service.engine import capture_check, loop, model_runner
from service.engine.batch import build_batch
from service.engine.captured import sizes_for
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.model_runner import ModelRunner
from service.engine.observer import Silent, StepReport
from service.engine.request import AdapterRef, Request
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.metrics import Metrics
from tests.oracle import (
    ALL_LINEARS,
    ARCHITECTURES,
    PeftOracle,
    make_adapter,
    make_base,
    read_manifest,
)
from tests.service.engine.operations import Operations
from tests.zoo import (
    Recorder,
    Zoo,
    assert_equals_oracle,
    collect,
    greedy,
    held,
    random_prompt,
    specimen,
)

pytestmark = pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")

BLOCK, BLOCKS, CONTEXT = 4, 64, 24
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 5},
    "rslora": {"rank": 8, "targets": ["q_proj", "down_proj"]},
    "dora": {"rank": 4},
    "head": {"kind": "lora", "rank": 3, "targets": [*ALL_LINEARS, "lm_head"]},
    "beft": {"targets": ["v_proj"]},
    "vera": {"rank": 6},  # scales a term by itself: more than a slot can say
}
Adapters = dict[AdapterRef, LoweredAdapter]


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Operations:
    """On the CPU as on a GPU: transformers' own layers, and our products."""
    monkeypatch.setattr(model_runner, "fuse", lambda model: None)
    return Operations(monkeypatch)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("captured")
    make_base(where / "base", "qwen3")
    for seed, (name, options) in enumerate(KINDS.items()):
        more = {"kind": name, **options}
        make_adapter(where / name, where / "base", more.pop("kind"), seed=seed, **more)
    return where


@pytest.fixture
def base(home: Path) -> Base:
    return load_base(home / "base", device="cpu", dtype="float32", keep=False)


def adapters_of(base: Base, home: Path) -> Adapters:
    found = {}
    for name in KINDS:
        manifest = read_manifest(home / name, base.spec)
        lowered = lower(manifest, home / name / "adapter_model.safetensors", base)
        found[AdapterRef(manifest.digest, name)] = lowered
    return found


def captured(base: Base, operations: Operations, most: int = 8, **options: Any) -> ModelRunner:
    find_fault = options.pop("find_fault", capture_check.find_fault)
    runner = ModelRunner(base, BLOCKS, BLOCK, sizes=sizes_for(most), **options)
    runner.capture(operations, CONTEXT, find_fault)
    return runner


def sequences_of(rng: random.Random, count: int, refs: list[AdapterRef | None]) -> list[Sequence]:
    free = rng.sample(range(BLOCKS), BLOCKS)
    made = []
    for number in range(count):
        tokens = [rng.randrange(200) for _ in range(rng.randint(1, CONTEXT - 3))]
        request = Request(str(number), tuple(tokens), adapter=rng.choice(refs))
        sequence = Sequence(number, request, 0, 0, tokens, len(tokens), b"")
        sequence.active_from = rng.choice([0, 0, len(tokens)])  # the base's until then
        sequence.blocks = [free.pop() for _ in range(CONTEXT // BLOCK)]
        made.append(sequence)
    return made


class Play:
    """Steps twice: as they come, and replayed from the very same cache."""

    def __init__(self, runner: ModelRunner, adapters: Adapters) -> None:
        self.runner = runner
        self.resident = {ref.key: adapter for ref, adapter in adapters.items()}
        self.kept = [*runner.cache.keys, *runner.cache.values]

    def prompts(self, sequences: list[Sequence]) -> None:
        chunks = [Chunk(s, 0, len(s.tokens) - 1) for s in sequences if len(s.tokens) > 1]
        self.runner.run(build_batch(chunks, BLOCK), self.resident, self.runner.cache)

    def step(self, chunks: list[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits as they come, logits replayed), each [L, V]; blocks must not differ either."""
        batch = build_batch(chunks, BLOCK)
        owned = {block for chunk in chunks for block in chunk.sequence.blocks}
        others = [block for block in range(BLOCKS) if block not in owned]
        for tensor in self.kept:
            tensor.view(torch.int8)[others] = -1
        before = [tensor.clone() for tensor in self.kept]
        wanted = self.runner.run(batch, self.resident, self.runner.cache).clone()
        hidden = [self.runner.hidden(row) for row in range(len(wanted))]
        after = [tensor[:BLOCKS].clone() for tensor in self.kept]
        for tensor, old in zip(self.kept, before, strict=True):
            tensor.copy_(old)
            tensor[BLOCKS:].view(torch.int8).fill_(-1)  # NaN in floats, and as a scale
        self.runner._before_head = torch.empty(0)
        found = self.runner.run(batch, self.resident)
        if self.runner.replayed:
            assert [self.runner.hidden(row) for row in range(len(found))] == hidden
        for tensor, written in zip(self.kept, after, strict=True):
            assert torch.equal(tensor[:BLOCKS].view(torch.int8), written.view(torch.int8))
        return wanted, found


def grown(rng: random.Random, sequence: Sequence) -> Chunk:
    """A step's part of a sequence: its last token, now and then with a draft behind."""
    start = len(sequence.tokens) - 1
    draft = tuple(rng.randrange(200) for _ in range(rng.choice([0, 0, 0, 2])))
    return Chunk(sequence, start, 1, draft)


@pytest.mark.parametrize("kv_dtype", [None, pytest.param(torch.int8, marks=pytest.mark.slow)])
def test_replays_have_the_bits_of_steps_as_they_come(
    base: Base, home: Path, operations: Operations, kv_dtype: torch.dtype | None
) -> None:
    runner = captured(base, operations, kv_dtype=kv_dtype)
    assert len(operations.counts) == 2 * len(sizes_for(8))
    adapters = adapters_of(base, home)
    told = [None, *(ref for ref in adapters if ref.name != "vera")]
    play, rng, sizes = Play(runner, adapters), random.Random(3), set()
    for _ in range(10):
        sequences = sequences_of(rng, rng.randint(1, 7), told)
        play.prompts(sequences)
        chunks = [grown(rng, s) for s in sequences][: rng.randint(1, 7)]
        rows = sum(chunk.rows for chunk in chunks)
        wanted, found = play.step(chunks)
        assert runner.replayed == (rows <= 8)
        assert torch.equal(found, wanted)
        sizes.add(rows)
    assert {1, 3, 8} & sizes
    assert max(sizes) > 8 > min(sizes)


def test_a_step_that_is_not_sampled_gives_its_own_rows(
    base: Base, home: Path, operations: Operations
) -> None:
    """Short pieces of prompts fit a captured step too; only the rows that were asked for come."""
    play, rng = Play(captured(base, operations), {}), random.Random(5)
    first, second = sequences_of(rng, 2, [None])
    first.tokens, second.tokens = [5, 6, 7, 8, 9], [1]
    wanted, found = play.step([Chunk(first, 0, 3), Chunk(second, 0, 1)])
    assert play.runner.replayed
    assert torch.equal(found, wanted)
    assert len(found) == 1


def test_an_adapter_that_no_slot_can_say_is_served_as_it_comes(
    base: Base, home: Path, operations: Operations
) -> None:
    adapters = adapters_of(base, home)
    for ref, lora in list(adapters.items()):
        if ref.name == "rslora":
            twice = {p: replace(d, low_rank=2 * d.low_rank) for p, d in lora.deltas.items()}
            adapters[AdapterRef("two terms", "two terms")] = replace(
                lora, digest="two terms", deltas=twice
            )
    play, rng = Play(captured(base, operations), adapters), random.Random(6)
    for name, replayed in (("vera", False), ("two terms", False), ("lora", True)):
        (ref,) = (ref for ref in adapters if ref.name == name)
        sequences = sequences_of(rng, 2, [ref])
        play.prompts(sequences)
        wanted, found = play.step([Chunk(s, len(s.tokens) - 1, 1) for s in sequences])
        assert play.runner.replayed is replayed
        assert torch.equal(found, wanted)


def test_more_adapters_than_slots_take_turns(
    base: Base, home: Path, operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "slots_for", lambda rows: rows)
    loras = {ref: it for ref, it in adapters_of(base, home).items() if ref.name == "lora"}
    ((_, one),) = loras.items()
    many = {AdapterRef(f"twin-{n}", f"twin-{n}"): scaled(one, f"twin-{n}", n) for n in range(5)}
    play, rng = Play(captured(base, operations, most=2), many), random.Random(7)
    refs = list(many)
    for pair in ((0, 1), (0, 2), (1, 2), (3, 4), (0, 4)):
        sequences = [sequences_of(rng, 2, [refs[i]])[at] for at, i in enumerate(pair)]
        for at, sequence in enumerate(sequences):
            sequence.active_from = 0
            sequence.blocks = list(range(at * 6, at * 6 + 6))
        play.prompts(sequences)
        wanted, found = play.step([Chunk(s, len(s.tokens) - 1, 1) for s in sequences])
        assert play.runner.replayed
        assert torch.equal(found, wanted)
    play.runner.forget(refs[0].digest)
    play.runner.forget(refs[4].digest)
    sequences = sequences_of(rng, 1, refs[4:])  # what is seen again comes back to a slot
    play.prompts(sequences)
    wanted, found = play.step([Chunk(s, len(s.tokens) - 1, 1) for s in sequences])
    assert torch.equal(found, wanted)


def scaled(adapter: LoweredAdapter, digest: str, number: int) -> LoweredAdapter:
    """Another adapter of the same shapes, with memory of its own."""
    return replace(adapter.mapped(lambda part: part * (1 + number)), digest=digest)


@pytest.mark.parametrize("sort", [False, True])
def test_a_capture_that_is_wrong_is_not_served(
    base: Base, operations: Operations, caplog: pytest.LogCaptureFixture, sort: bool
) -> None:
    def fault_of(runner: ModelRunner, size: int, adapted: bool) -> str:
        assert capture_check.find_fault(runner, size, adapted) == ""
        return "its logits are off by 1.4" if (size, adapted) == (4, sort) else ""

    with caplog.at_level(logging.WARNING):
        runner = captured(base, operations, find_fault=fault_of)
    which = "with" if sort else "without"
    assert f"steps {which} adapters are not captured: size 4: its logits are off" in caplog.text
    assert runner.captured is not None
    kinds = {adapted for _, adapted in runner.captured._captured}
    assert kinds == ({False} if sort else set())


def test_a_capture_that_fails_is_no_end_of_the_server(
    base: Base, operations: Operations, caplog: pytest.LogCaptureFixture
) -> None:
    def record(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    operations.record = record  # type: ignore[method-assign]
    runner = captured(base, operations)
    assert "RuntimeError: operation not permitted" in caplog.text
    (sequence,) = sequences_of(random.Random(0), 1, [None])
    assert runner.run(build_batch([Chunk(sequence, 0, 1)], BLOCK), {}).isfinite().all()
    assert runner.replayed is False


def break_by(name: str, patch: pytest.MonkeyPatch) -> None:
    """Something of a captured step that is not as the step was."""
    from service.engine.captured import StaticBatch

    real = StaticBatch.fill

    def fill(self: Any, batch: Any, tiles: Any, size: int) -> None:
        if name == "tiles":
            tiles = [(a, b, 1 - slot) for a, b, slot in tiles]
        else:
            other = (getattr(batch, name) + 1) % 4
            batch = replace(batch, **{name: other.to(getattr(batch, name).dtype)})
        real(self, batch, tiles, size)

    patch.setattr(StaticBatch, "fill", fill)


@pytest.mark.parametrize(
    "name",
    ["tiles", "block_tables"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("input_ids", "position_ids")],
)
def test_the_check_finds_what_is_wrong(
    base: Base, operations: Operations, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runner = captured(base, operations)
    assert capture_check.find_fault(runner, 8, True) == ""
    break_by(name, monkeypatch)
    assert capture_check.find_fault(runner, 8, True).startswith("its logits are off by")


@pytest.mark.parametrize(
    ("sequences", "sizes"), [(1, (1,)), (5, (1, 2, 4, 8)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_sizes_reach_what_may_run_at_once(sequences: int, sizes: tuple[int, ...]) -> None:
    assert sizes_for(sequences) == sizes
    assert sizes_for(10_000)[-1] == 256


class TestTheRecorder:
    """It is as strict as a graph: else the tests above say nothing."""

    def test_python_values_are_those_of_the_capture(self, operations: Operations) -> None:
        x, factor = torch.tensor([1.0, 2.0]), [3.0]
        made, replay = operations.record(lambda: (x * factor[0]).cumsum(0))
        factor[0] = 100.0
        x.copy_(torch.tensor([5.0, 6.0]))
        replay()
        assert made.tolist() == [15.0, 33.0]

    @pytest.mark.parametrize(
        "waiting",
        [
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: 1 if (x > 0).all() else 0,
            lambda x: x[x > 1],
            lambda x: x.to("cpu").numpy(),
        ],
    )
    def test_it_refuses_to_wait(self, operations: Operations, waiting: Any) -> None:
        x = torch.tensor([1.0, 2.0])
        with pytest.raises(AssertionError, match="waits for the device"):
            operations.record(lambda: waiting(x))
        assert x.tolist() == [1.0, 2.0]


class Reports(Silent):
    """Which steps were replayed."""

    def __init__(self) -> None:
        self.kinds: list[bool | None] = []

    def stepped(self, report: StepReport) -> None:
        self.kinds.append(report.replayed)


def serve(base: Base, home: Path, names: tuple[str | None, ...]) -> list[bool]:
    """Requests that run together, each against PEFT alone; returns which steps were replayed."""
    zoo = Zoo(home / "base", base, [specimen(home / name, base) for name in names if name])
    reports, rng = Reports(), random.Random(9)
    limits = EngineConfig(max_sequences=4, kv_cache_bytes=1 << 22, max_model_len=64)
    engine = Engine(base, zoo.fetch, limits, reports)
    recorder = Recorder(engine)
    engine.start()
    try:
        asked = [
            greedy(str(i), random_prompt(rng, 500, 40), name and zoo.named(name).ref(), new=6 + i)
            for i, name in enumerate(names)
        ]
        for name in filter(None, names):  # who is loaded late would end late
            engine.load(zoo.named(name).ref())
        with held(engine):
            streams = [engine.submit(each) for each in asked]
        outputs = [collect(stream) for stream in streams]
        for request, name, (tokens, (end,)) in zip(asked, names, outputs, strict=True):
            assert (end.reason, end.error) == ("length", None)
            rows = {p: row.cpu() for p, row in recorder.rows(request.id).items()}
            oracle = PeftOracle(home / "base", home / name if name else None)
            assert_equals_oracle(oracle, list(request.prompt), [t.id for t in tokens], rows)
        engine.check_integrity()
    finally:
        engine.stop()
    return [kind for kind in reports.kinds if kind is not None]


def test_requests_of_an_engine_equal_peft(
    base: Base, home: Path, operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "recorder_for", lambda device: operations)
    kinds = serve(base, home, (None, "lora", "dora", "vera", "head"))
    assert True in kinds
    assert False in kinds
    assert kinds[-1] is True  # vera ends before: what is left is told by slots


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_can_be_captured(name: str, tmp_path: Path, operations: Operations) -> None:
    """None of their layers waits for the device, or keeps a number of the capture's."""
    base = load_base(make_base(tmp_path, name), device="cpu", dtype="float32", keep=False)
    runner = captured(base, operations, most=4)
    assert len(operations.counts) == 2 * len(sizes_for(4))
    assert capture_check.find_fault(runner, 4, True) == ""


def test_the_metrics_count_both_modes() -> None:
    metrics, idle = Metrics("m"), StepReport(0, 0, 0, 1, 0, 0, 0, 0, 0, 0.0)
    for replayed in (True, True, False, None):
        metrics.stepped(replace(idle, replayed=replayed))
    told = metrics.exposition().decode()
    assert 'nibble:steps_total{mode="replayed",model_name="m"} 2.0' in told
    assert 'nibble:steps_total{mode="eager",model_name="m"} 1.0' in told


def test_off_captures_nothing(
    base: Base, operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "recorder_for", lambda device: operations)
    engine = Engine(base, lambda ref: NotImplemented, EngineConfig(cuda_graphs="off"))
    assert engine._runner.captured is None
    assert operations.counts == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_requests_equal_peft(home: Path) -> None:
    base = load_base(home / "base", device="cuda", dtype="float32", keep=False)
    kinds = serve(base, home, (None, "lora", "dora", "vera", "head"))
    assert True in kinds, "no step was replayed: the log says why"
