"""Layers that run in C alone: the bits of those that call the attention that is registered."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from base import kernels
from base.fused import Decoder
from base.kernels import CachePages, DecoderHalves, StepPages
from base.load import load_base
from service.engine.attention import Step
from service.engine.batch import build_batch
from service.engine.model_runner import ModelRunner
from service.engine.request import Request
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from tests.oracle import make_base

pytestmark = pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")

SIDEWAYS: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 4,
    "query_pre_attn_scalar": 32,
    "head_dim": 32,
}
BLOCK = 4


def runner_of(home: Path, name: str, kv_dtype: torch.dtype | None, **config: Any) -> ModelRunner:
    source = make_base(home / name, name, tied=name.startswith("gemma"), **config)
    base = load_base(source, device="cpu", dtype="float32", keep=False)
    return ModelRunner(base, 32, BLOCK, kv_dtype)


def play(runner: ModelRunner) -> torch.Tensor:
    """Three sequences, their prompts in two chunks: the logits of all that asked for some."""
    rng, rows = random.Random(5), []
    blocks = rng.sample(range(32), 32)
    sequences = []
    for number, length in enumerate((9, 5, 13)):
        prompt = tuple(rng.randrange(200) for _ in range(length))
        request = Request(str(number), prompt, prompt_logprobs=True)
        sequence = Sequence(number, request, 0, 0, list(prompt), length, b"")
        sequence.blocks = [blocks.pop() for _ in range(-(-length // BLOCK))]
        sequences.append(sequence)
    for first, last in ((0, 4), (4, 13)):
        chunks = [
            Chunk(s, first, min(last, len(s.tokens)) - first)
            for s in sequences
            if len(s.tokens) > first
        ]
        rows.append(runner.run(build_batch(chunks, BLOCK), {}).clone())
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "config"),
    [
        ("qwen3", None, {}),
        ("mistral", torch.bfloat16, {"sliding_window": 4}),
        ("gemma2", torch.int8, {**SIDEWAYS, "attn_logit_softcapping": 20.0}),
        ("gemma3_text", None, SIDEWAYS),
    ],
)
def test_they_have_the_same_bits(
    name: str,
    kv_dtype: torch.dtype | None,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = runner_of(tmp_path, name, kv_dtype, **config)
    ran: list[int] = []
    real = DecoderHalves.run

    def run(self: DecoderHalves, layers: Any, *rest: Any) -> torch.Tensor:
        ran.append(len(layers))
        return real(self, layers, *rest)

    monkeypatch.setattr(DecoderHalves, "run", run)
    whole = play(runner)
    assert ran == [2, 2]
    runner.cache.keys[0].zero_()
    monkeypatch.setattr(Step, "pages", lambda self: None)
    assert torch.equal(play(runner), whole)
    assert ran == [2, 2]


def test_a_layer_that_somebody_looks_at_is_called(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, "qwen3", None)
    whole, seen = play(runner), []
    layer = runner.base.model.model.layers[1]
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(play(runner), whole)
    assert seen == [1, 1]
    hook.remove()
    hook = layer.mlp.register_forward_hook(lambda *_: seen.append(2))
    assert torch.equal(play(runner), whole)
    assert seen == [1, 1, 2, 2]


def test_refuses_pages_that_do_not_fit(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, "qwen3", None)
    decoder, cache = runner._decoder, runner.cache
    assert isinstance(decoder, Decoder)
    ids, rows = torch.tensor([[1, 2]]), torch.tensor([1])
    slots, tables = torch.tensor([0, 1]), torch.zeros(1, 1, dtype=torch.int32)
    starts, lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)

    def run(slots: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        pages = StepPages(cache.pages, slots, tables, starts, lengths, set())
        return decoder(ids, torch.tensor([[0, 1]]), rows, pages)

    assert run(slots, tables).isfinite().all()
    with pytest.raises(ValueError, match="outside"):
        run(slots, tables + 32)
    with pytest.raises(ValueError, match="outside"):
        run(slots + 4 * 32, tables)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        run(slots.int(), tables)
    with pytest.raises(ValueError, match="alike"):
        CachePages([cache.keys[0], cache.keys[0].bfloat16()], cache.values)
