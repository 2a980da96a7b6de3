"""The peers over HTTP. llama-server is a stand-in here, unless a real one is on the path."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from pathlib import Path

import pytest

from base.load import load_base
from base.mini import MINI
from service.bench.launch import ServerFailed
from service.bench.peer import Setup
from service.bench.random_adapters import random_adapters
from service.bench.scenario import DISTINCT, NONE, Job, Scenario, job
from service.bench.server_peers import (
    OVER_HTTP,
    LlamaServerPeer,
    NibbleServerPeer,
    _llama_tokens,
    _nibble_tokens,
)
from tests.oracle import make_base

NEW = 4
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, ...]]:
    """A base of a shape that llama.cpp reads, and eight LoRAs."""
    where = tmp_path_factory.mktemp("served")
    base = make_base(where / "base", "qwen2")
    spec = load_base(base, device="cpu").spec
    return base, tuple(random_adapters(where, spec, 8, 4))


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "llama_server.py"} "$@"\n')
    program.chmod(0o755)
    return program


def _check(peer: NibbleServerPeer | LlamaServerPeer, scenario: Scenario) -> None:
    result = peer.run(job(scenario, 0, 256, 16, NEW), OVER_HTTP)
    assert result.tokens == len(scenario.adapters) * NEW
    assert len(result.first_token) == len(scenario.adapters)
    assert 0 < min(result.first_token) < result.seconds


def test_llama_server_is_asked_by_its_documented_api(
    served: tuple[Path, tuple[Path, ...]], stand_in: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the extra `bench` is not installed")
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"GGUF")  # kept from an earlier run, so llama.cpp need not quantise
    options = {"binary": stand_in, "gguf": gguf, "architecture": "qwen2"}
    with closing(LlamaServerPeer(Setup(*served, 2, options))) as peer:
        _check(peer, DISTINCT)
        _check(peer, NONE)
        with pytest.raises(ServerFailed, match=r"400: .*Invalid request"):
            peer.run(Job(Scenario("one more", (8,)), ((1, 2),), NEW), OVER_HTTP)
    asked = [json.loads(line) for line in gguf.with_suffix(".asked").read_text().splitlines()]
    assert sorted(one["lora"][0]["id"] for one in asked[:8]) == list(range(8))
    assert {one["lora"][0]["scale"] for one in asked[:8]} == {1.0}
    assert [one["lora"] for one in asked[8:16]] == [[]] * 8
    assert all(one["n_predict"] == NEW and one["ignore_eos"] and one["stream"] for one in asked)


def test_a_program_that_is_no_server_is_told_of(
    served: tuple[Path, tuple[Path, ...]], tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the extra `bench` is not installed")
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"GGUF")
    options = {"binary": shutil.which("false"), "gguf": gguf, "architecture": "qwen2"}
    with pytest.raises(ServerFailed, match="did not start"):
        LlamaServerPeer(Setup(*served, 1, options))


@pytest.mark.slow
def test_the_real_llama_server(served: tuple[Path, tuple[Path, ...]], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the extra `bench` is not installed")
    binary = shutil.which("llama-server")
    if binary is None:
        pytest.skip("no llama-server on the path")
    options = {"binary": binary, "gguf": tmp_path / "base.gguf", "architecture": "qwen2"}
    with closing(LlamaServerPeer(Setup(*served, 2, options))) as peer:
        _check(peer, DISTINCT)
        _check(peer, NONE)


@pytest.mark.slow
def test_nibble_over_http(tmp_path: Path) -> None:
    spec = load_base(MINI, device="cpu").spec
    adapters = tuple(random_adapters(tmp_path, spec, 8, 4))
    with closing(NibbleServerPeer(Setup(MINI, adapters, 1, {"precision": "fast"}))) as peer:
        _check(peer, DISTINCT)
        _check(peer, NONE)


def test_what_counts_as_a_token() -> None:
    chunk = {"choices": [{"text": "a", "finish_reason": None}]}
    end = {"choices": [{"text": "", "finish_reason": "length"}]}
    assert [_nibble_tokens(event) for event in (chunk, end)] == [1, 0]
    assert [_llama_tokens({"tokens": t}) for t in ([7], [])] == [1, 0]
