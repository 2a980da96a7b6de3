import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.limits import Limits
from base.load import load_base
from base.spec import BaseSpec
from tests.oracle import make_adapter, make_base


@dataclass(frozen=True)
class Saved:
    """One adapter that PEFT itself wrote."""

    directory: Path

    @property
    def weights(self) -> Path:
        return self.directory / "adapter_model.safetensors"

    @property
    def config(self) -> bytes:
        return (self.directory / "adapter_config.json").read_bytes()

    def with_fields(self, **fields: Any) -> bytes:
        """The config with some fields overwritten."""
        return json.dumps(json.loads(self.config) | fields).encode()


Saver = Callable[..., Saved]


@dataclass(frozen=True)
class TinyBase:
    directory: Path
    spec: BaseSpec


@pytest.fixture(scope="session")
def limits() -> Limits:
    return Limits()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], TinyBase]:
    """bases(tied): a tiny random Qwen3 with biases, and its spec as the server reads it."""
    made: dict[bool, TinyBase] = {}

    def make(tied: bool = False) -> TinyBase:
        if tied not in made:
            directory = make_base(tmp_path_factory.mktemp("base"), "qwen3", tied=tied)
            cache = tmp_path_factory.mktemp("hashes")
            loaded = load_base(directory, device="cpu", dtype="float32", cache_dir=cache)
            made[tied] = TinyBase(directory, loaded.spec)
        return made[tied]

    return make


@pytest.fixture(scope="session")
def spec(bases: Callable[..., TinyBase]) -> BaseSpec:
    return bases(False).spec


@pytest.fixture(scope="session")
def save(bases: Callable[..., TinyBase], tmp_path_factory: pytest.TempPathFactory) -> Saver:
    """save("dora", rank=8, ...): an adapter that PEFT saved; the same arguments, the same one."""
    made: dict[str, Saved] = {}

    def make(kind: str = "lora", tied: bool = False, **fields: Any) -> Saved:
        key = json.dumps([kind, tied, fields], sort_keys=True, default=list)
        if key not in made:
            directory = tmp_path_factory.mktemp("adapter")
            make_adapter(directory, bases(tied).directory, kind, **fields)
            made[key] = Saved(directory)
        return made[key]

    return make
