"""`--kv-dtype`: how many tokens fit, what of them is kept, and what that does to the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from base.kernels import pack, unpack
from base.load import Base, load_base
from service.config import ConfigError, configure
from service.engine.attention import KVCache
from service.engine.batch import build_batch
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.model_runner import ModelRunner
from service.engine.request import Request
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from tests.oracle import make_base

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "b", "qwen2")


@pytest.fixture
def base(directory: Path) -> Base:
    return load_base(directory, device="cpu", dtype="float32", keep=False)


def test_fewer_bits_hold_more_tokens(base: Base) -> None:
    """Heads of 32: 128 bytes in float32, 64 in bfloat16, 32 and a scale of 4 in int8."""
    found = {}
    names: tuple[Any, ...] = ("auto", "float32", "bfloat16", "int8")
    for name in names:
        config = EngineConfig(kv_cache_bytes=MIB, kv_dtype=name, max_sequences=4096)
        found[name] = config.blocks_for(base)
        cache = KVCache(base.spec, found[name], 16, config.kept_dtype(base), CPU)
        assert MIB - 16 * config.token_bytes(base) < cache.nbytes <= MIB
    assert found["auto"] == found["float32"] == MIB // (2 * 2 * 16 * 128)
    assert found["bfloat16"] == 2 * found["float32"]
    assert found["int8"] == MIB // (2 * 2 * 16 * 36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_virtual_tokens_are_kept_as_others_are(base: Base, dtype: torch.dtype) -> None:
    cache = KVCache(base.spec, 4, 16, dtype, CPU)
    keys, values = torch.randn(2, 2, 5, 1, 32)
    cache.fill(2, keys, values)
    for kept, given in ((cache.keys, keys), (cache.values, values)):
        for layer in range(2):
            back = unpack(kept[layer], 32)
            assert torch.equal(back[2, :5], unpack(pack(given[layer], dtype), 32))
            assert not back[[0, 1, 3]].any()


def test_what_it_does_to_the_logits(directory: Path) -> None:
    """The first token sees itself alone; then the error is that of the keys and values."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        base = load_base(directory, device="cpu", dtype="float32", keep=False)
        runner = ModelRunner(base, 8, 16, dtype)
        prompt = tuple(range(7, 107))
        request = Request("0", prompt, prompt_logprobs=True)
        sequence = Sequence(0, request, 0, 0, list(prompt), len(prompt), b"")
        sequence.blocks = [3, 1, 0, 2, 6, 5, 4]
        batch = build_batch([Chunk(sequence, 0, len(prompt))], 16)
        found[dtype] = runner.run(batch, {})
    right = found[torch.float32]
    for dtype, allowed in ((torch.bfloat16, 0.01), (torch.int8, 0.02)):
        assert 0 < (found[dtype] - right).norm() <= allowed * right.norm()


def test_the_engine_is_told(directory: Path) -> None:
    assert configure({"kv_dtype": "int8"}).settings.kv_dtype == "int8"
    with pytest.raises(ConfigError, match=r"kv.dtype"):
        configure({"kv_dtype": "int4"})
    base = load_base(directory, device="cpu", dtype="float32", keep=False)
    engine = Engine(base, lambda *_: None, EngineConfig(kv_dtype="bfloat16", max_sequences=2))  # type: ignore[arg-type, return-value]
    assert engine._runner.cache.dtype is torch.bfloat16
    engine.stop()
