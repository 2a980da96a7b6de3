"""Bit for bit: a request's logits are the same whatever shares its steps, however its prompt is cut
into chunks, wherever its blocks lie, and on any number of threads.

The order of every sum in a row is fixed by the row alone. Here one request after another is
computed by itself in one piece; then random mixes of them must give the very same bits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.delta import LoweredAdapter
from adapters.lowering import lower
from base import kernels
from base.load import Base, load_base
from base.mini import MINI
from service.engine.batch import build_batch
from service.engine.model_runner import ModelRunner
from service.engine.request import AdapterRef, Request
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from tests.oracle import ALL_LINEARS, make_adapter, make_base, read_manifest

pytestmark = pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")

BLOCK = 16
LONGEST = 70  # tokens
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 5},
    "rslora": {"rank": 8, "targets": ["q_proj", "down_proj"]},
    "dora": {"rank": 4},
    "lora_everywhere": {"kind": "lora", "targets": [*ALL_LINEARS, "embed_tokens", "lm_head"]},
    "lora_norms": {"kind": "lora", "modules_to_save": ["norm", "input_layernorm", "q_norm"]},
    "lora_head": {"kind": "lora", "modules_to_save": ["lm_head"]},
    "ia3": {},
    "loha": {"rank": 3},
    "vera": {"rank": 6},
    "miss": {"rank": 4},
    "ln_tuning": {"targets": ["input_layernorm", "post_attention_layernorm"]},
    "beft": {"targets": ["v_proj"]},
}
MERGED = (("dora", "float32"), ("lora_everywhere", "bfloat16"), ("lora", "nf4"))


@dataclass(slots=True)
class Stage:
    """A runner, its adapters, and each request's logits when it is alone."""

    runner: ModelRunner
    adapters: dict[Any, LoweredAdapter]
    requests: list[Request]
    alone: list[torch.Tensor]

    @classmethod
    def of(
        cls,
        base: Base,
        source: Path,
        home: Path,
        requests: int,
        kv_dtype: torch.dtype | None = None,
    ) -> Stage:
        rng = random.Random(0)
        adapters = dict(lowered(base, source, home))
        runner = ModelRunner(base, 16 * 8, BLOCK, kv_dtype)
        refs = [None, *(ref for ref, _ in adapters.values())]
        resident = {key: adapter for key, (_, adapter) in adapters.items()}
        asked = []
        for i in range(requests):
            prompt = [rng.randrange(base.spec.vocab_size) for _ in range(rng.randint(2, LONGEST))]
            ref = refs[i % len(refs)]
            asked.append(Request(str(i), tuple(prompt), adapter=ref, prompt_logprobs=True))
        stage = cls(runner, resident, asked, [])
        torch.set_num_threads(1)
        stage.alone = [stage.whole(request) for request in asked]
        return stage

    def whole(self, request: Request) -> torch.Tensor:
        """Its logits [T, vocabulary] where nothing else runs, in one chunk."""
        sequence = Sequence(0, request, 0, 0, list(request.prompt), len(request.prompt), b"")
        sequence.blocks = list(range(-(-LONGEST // BLOCK)))
        chunk = Chunk(sequence, 0, len(request.prompt))
        return self.runner.run(build_batch([chunk], BLOCK), self.adapters).clone()

    def play(self, requests: list[Request], rng: random.Random, most: int) -> dict[str, Any]:
        """Logits [T, vocabulary] of each request, in steps of random chunks of at most `most`."""
        blocks = rng.sample(range(16 * 8), 16 * 8)
        sequences = []
        for i, request in enumerate(requests):
            tokens = list(request.prompt)
            sequence = Sequence(i, request, 0, 0, tokens, len(tokens), b"")
            sequence.blocks = [blocks.pop() for _ in range(-(-len(tokens) // BLOCK))]
            sequences.append(sequence)
        rows: dict[str, list[torch.Tensor]] = {request.id: [] for request in requests}
        while left := [s for s in sequences if s.uncomputed]:
            taking = rng.sample(left, rng.randint(1, len(left)))
            counts = [
                min(s.uncomputed, most if most > 32 else rng.randint(1, most)) for s in taking
            ]
            chunks = [Chunk(s, s.computed, n) for s, n in zip(taking, counts, strict=True)]
            batch = build_batch(chunks, BLOCK)
            logits = self.runner.run(batch, self.adapters)
            for row, owner in zip(logits, batch.logit_chunks, strict=True):
                rows[batch.chunks[owner].sequence.request.id].append(row)
            for chunk in chunks:
                chunk.sequence.computed += chunk.count
        return {name: torch.stack(own) for name, own in rows.items()}

    def check(self, mixes: int, seed: int) -> None:
        rng = random.Random(seed)
        for number in range(mixes):
            torch.set_num_threads(rng.randint(1, 4))
            chosen = rng.sample(self.requests, rng.randint(2, 8))
            found = self.play(chosen, rng, rng.choice([1, 7, 32, LONGEST]))
            for request in chosen:
                same = torch.equal(found[request.id], self.alone[int(request.id)])
                name = request.adapter.name if request.adapter else "the base"
                assert same, f"mix {number} of seed {seed}: other bits for {name}"


def lowered(base: Base, source: Path, home: Path) -> Iterator[tuple[Any, Any]]:
    """(key, (ref, adapter)) of every kind above, and of some merged."""
    manifests = {}
    for seed, (name, options) in enumerate(KINDS.items()):
        kind = options.get("kind", name)
        more = {k: v for k, v in options.items() if k != "kind"}
        if name == "lora_norms" and base.spec.architecture != "qwen3":
            more["modules_to_save"] = ["norm", "input_layernorm"]
        where = make_adapter(home / name, source, kind, seed=seed, **more)
        manifests[name] = (read_manifest(where, base.spec), where)
    for name, dtype in MERGED:
        manifest, where = manifests[name]
        merged = replace(manifest, placement="merged", merged_dtype=dtype)
        manifests[f"{name}, merged in {dtype}"] = (merged, where)
    for name, (manifest, where) in manifests.items():
        ref = AdapterRef(manifest.digest, name, manifest.placement, manifest.merged_dtype)
        yield ref.key, (ref, lower(manifest, where / "adapter_model.safetensors", base))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny(home: Path, name: str, precision: Any = "exact", **config: Any) -> tuple[Base, Path]:
    source = make_base(home / "base", name, **config)
    return load_base(source, device="cpu", dtype="float32", precision=precision), source


@pytest.mark.parametrize(
    ("name", "precision", "width", "kv_dtype"),
    [
        # No multiple of a vector or a block: each loop has its remainder.
        ("qwen3", "exact", 100, None),
        ("gemma", "fast", 128, torch.int8),
    ],
)
def test_mixes_have_the_bits_of_each_request_alone(
    name: str, precision: str, width: int, kv_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    base, source = tiny(tmp_path, name, precision, intermediate_size=width)
    assert base.precision == precision
    Stage.of(base, source, tmp_path, 16, kv_dtype).check(mixes=12, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", ["mini", "qwen2", "qwen3", "llama", "gemma"])
def test_five_hundred_mixes(name: str, precision: Any, tmp_path: Path) -> None:
    """100 on each of five bases, in both precisions."""
    if name == "mini":
        source = MINI
        base = load_base(MINI, device="cpu", dtype="float32", precision=precision)
    else:
        base, source = tiny(tmp_path, name, precision)
    Stage.of(base, source, tmp_path, 32).check(mixes=100, seed=len(name))


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own product of the head rounds by the number of rows, and is found out."""
    base, source = tiny(tmp_path, "qwen3")
    stage = Stage.of(base, source, tmp_path, 8)
    steps = kernels.steps()
    assert steps is not None
    real = type(steps).dense_linear

    def by_rows(self: Any, x: Any, weight: Any, bias: Any, y: Any = None) -> Any:
        product = real(self, x, weight, bias, y)
        return product * (1 + 1e-7 * x.reshape(-1, x.shape[-1]).shape[0])

    monkeypatch.setattr(type(steps), "dense_linear", by_rows)
    with pytest.raises(AssertionError, match="other bits"):
        stage.check(mixes=3, seed=1)
