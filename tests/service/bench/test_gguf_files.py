from __future__ import annotations

from pathlib import Path

import pytest
import torch

from base.load import load_base
from service.bench.gguf_files import gguf_name, write_base, write_lora
from service.bench.peer import Setup
from service.bench.random_adapters import random_adapters
from service.bench.scenario import BASE, CHAT, DISTINCT, ONE, SAME, Job, Scenario, job
from tests.oracle import PeftOracle, make_base

NEW = 4


def test_every_module_of_the_base_has_a_name_and_no_two_share_one(base_directory: Path) -> None:
    model = load_base(base_directory, device="cpu").model
    paths = [path for path, module in model.named_modules() if module._parameters]
    names = {gguf_name(path) for path in paths}
    assert len(names) == len(paths) > 14
    assert gguf_name("model.layers.3.mlp.up_proj") == "blk.3.ffn_up"


def test_a_module_of_another_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts"):
        gguf_name("model.layers.0.mlp.experts")


def test_an_adapter_that_is_no_lora_is_refused(base_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra `bench` is not installed")
    spec = load_base(base_directory, device="cpu").spec
    dora = random_adapters(tmp_path, spec, 9, 4)[8]
    with pytest.raises(ValueError, match="no tensor of a plain LoRA"):
        write_lora(dora, "qwen3", tmp_path / "dora.gguf")


def test_a_bias_that_llama_cpp_would_not_read_is_refused(
    base_directory: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the extra `bench` is not installed")
    with pytest.raises(ValueError, match=r"attn_output\.bias: llama\.cpp has no place"):
        write_base(base_directory, tmp_path / "b.gguf", 1)
    assert not list(tmp_path.iterdir())


def test_llama_cpp_says_what_the_base_says_and_times_every_token(tmp_path: Path) -> None:
    """Q4_0 is another rounding of the same weights, so its logits resemble, and do not equal."""
    pytest.importorskip("gguf", reason="the extra `bench` is not installed")
    pytest.importorskip("llama_cpp", reason="the extra `bench` is not installed")
    from service.bench.llama_peer import ONE_BATCH, ONE_BY_ONE, LlamaPeer

    base = make_base(tmp_path / "base", "qwen2")
    spec = load_base(base, device="cpu").spec
    adapters = tuple(random_adapters(tmp_path, spec, 8, 4))
    vocabulary = spec.vocab_size
    options = {"gguf": tmp_path / "b.gguf", "architecture": "qwen2", "vocabulary": vocabulary}
    peer = LlamaPeer(Setup(base, adapters, 1, options))
    tried: tuple[tuple[Scenario, str], ...] = (
        (BASE, ONE_BATCH),
        (SAME, ONE_BATCH),
        (DISTINCT, ONE_BY_ONE),
        (CHAT, ONE_BATCH),
    )
    try:
        for scenario, way in tried:
            result = peer.run(job(scenario, 0, vocabulary, 16, NEW), way)
            assert result.tokens == len(scenario.adapters) * NEW
        prompt = tuple(range(40, 60))
        for scenario, adapter in ((BASE, None), (ONE, adapters[0])):
            peer._generate([prompt], scenario.adapters[0], Job(scenario, (prompt,), 1))
            logits = torch.tensor(peer._logits(len(prompt) - 1))
            oracle = PeftOracle(base, adapter).logits(list(prompt))[-1]
            assert torch.cosine_similarity(logits, oracle.float(), dim=0) > 0.9
    finally:
        peer.close()
    assert write_base(base, tmp_path / "b.gguf", 1).stat().st_size > 0
