"""Every method of the registry trains over NF4, saves what PEFT reads, and is served as trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from adapters.delta import LoweredAdapter
from adapters.lowering import lower
from adapters.operator import Segments
from adapters.store import AdapterStore
from base.load import Base
from tests.adapters.lowering.bottleneck_oracle import BottleneckOracle
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import PeftOracle, relative_error
from tests.training.runs import run_of
from training import checkpoint
from training.config import DataConfig, PublishConfig
from training.data import Example
from training.errors import MethodError
from training.methods import METHODS, attach
from training.methods.low_rank import LowRankAdapter
from training.publish import publish
from training.recipe import mean_loss, train

STOP = 2
PAIRS = [Example((10 + i, 50 + 3 * i, 90 + i, STOP), 1) for i in range(6)]
TOKENS = [3, 40, 41, 42, 99, 7, 300, 301]
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "initial_rank": 6},
    "vblora": {"vectors": 16, "vector_length": 16},
    "oft": {"block_size": 16},
    "waveft": {"coefficients": 64},
    "prompt_tuning": {"virtual_tokens": 4},
    "p_tuning": {"virtual_tokens": 4, "hidden": 32},
    "prefix_tuning": {"virtual_tokens": 4},
}
RATE = {"oft": 3e-2, "vera": 1e-1, "ia3": 1e-1, "vblora": 1e-1, "prefix_tuning": 1e-1}


def _logits(base: Base, adapter: Any) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.tensor([TOKENS])
        columns = torch.arange(len(TOKENS))
        logits: torch.Tensor = adapter.logits(tokens, torch.ones_like(tokens), columns)[0]
    return logits


@pytest.fixture(scope="module")
def server(base_directory: Path) -> Server:
    return Server(base_directory)


@torch.inference_mode()
def _served(server: Server, lowered: LoweredAdapter | None) -> torch.Tensor:
    """Logits of TOKENS by the operator; virtual tokens stand in the cache, as the engine has it."""
    server.context.segments = Segments.of([(len(TOKENS), lowered)])
    server.context.logit_segments = server.context.segments
    cache, first = DynamicCache(), 0
    if lowered is not None and lowered.prefix is not None:
        first = lowered.prefix.tokens
        for layer, (k, v) in enumerate(
            zip(lowered.prefix.keys, lowered.prefix.values, strict=True)
        ):
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
    output = server.base.model(
        input_ids=torch.tensor([TOKENS]),
        position_ids=first + torch.arange(len(TOKENS))[None],
        past_key_values=cache,
    )
    logits: torch.Tensor = output.logits[0]
    return logits


@pytest.mark.parametrize("kind", [name for name, row in METHODS.items() if not row.makes_base])
def test_it_learns_is_saved_served_as_trained_and_peft_reads_the_same(
    base: Base, base_directory: Path, tmp_path: Path, server: Server, kind: str
) -> None:
    frozen = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    config = run_of(
        kind, optim={"steps": 20, "learning_rate": RATE.get(kind, 2e-2)}, **OPTIONS.get(kind, {})
    )
    torch.manual_seed(0)
    adapter = attach(base, config)
    before = mean_loss(base, PAIRS, 6, adapter)
    done = train(base, adapter, PAIRS, PAIRS, config, lambda step: None)
    assert done.eval_loss is not None
    assert done.eval_loss < before - 0.01
    trained = _logits(base, adapter)
    adapter.save(tmp_path)
    adapter.detach()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    oracle = BottleneckOracle if kind == "bottleneck" else PeftOracle
    assert relative_error(trained, oracle(base_directory, tmp_path).logits(TOKENS)) < 1e-4
    served = _served(server, server.lower(tmp_path))
    assert relative_error(served, trained) < 1e-4
    assert relative_error(served, _served(server, None)) > 1e-3

    again = checkpoint.load(tmp_path, base)
    assert relative_error(_logits(base, again), trained) < 1e-5
    again.detach()


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
def test_a_bottleneck_goes_through_the_store_to_the_operator(
    base: Base, base_directory: Path, tmp_path: Path, server: Server, variant: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")  # publishing notes the hash of what was learnt from
    config = run_of("bottleneck", variant=variant, reduction=8).model_copy(
        update={
            "data": DataConfig(train=data),
            "out": tmp_path / "out",
            "publish": PublishConfig(name="mine", store=tmp_path),
        }
    )
    adapter = attach(base, config)
    plain = _logits(base, adapter)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    trained = _logits(base, adapter)
    adapter.save(config.out)
    adapter.detach()
    with torch.no_grad():  # it began as the base
        assert torch.equal(plain, base.model(input_ids=torch.tensor([TOKENS])).logits[0])
    assert publish(config, base) == "mine@1"
    store = AdapterStore(str(tmp_path / "blobs"), str(tmp_path / "catalog.db"))
    manifest = store.resolve("mine")
    assert (manifest.kind, manifest.rank) == ("bottleneck", 8)
    served = _served(server, lower(manifest, store.weights_path(manifest), server.base))
    store.close()
    assert relative_error(served, trained) < 1e-5
    wanted = BottleneckOracle(base_directory, config.out).logits(TOKENS)
    assert relative_error(served, wanted) < 1e-5
    again = checkpoint.load(config.out, base)
    assert relative_error(_logits(base, again), trained) < 1e-6
    again.detach()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_start_at_the_bases_directions_changes_nothing_yet_and_is_saved_at_twice_the_rank(
    base: Base, base_directory: Path, tmp_path: Path, kind: str, init: str
) -> None:
    adapter = attach(base, run_of(kind, rank=4, init=init))
    assert isinstance(adapter, LowRankAdapter)
    plain = _logits(base, adapter)
    with torch.no_grad():
        for layer in adapter.layers.values():
            assert layer.B.abs().max() > 0
            layer.B.mul_(1.1)
    moved = _logits(base, adapter)
    assert relative_error(moved, plain) > 1e-2
    adapter.save(tmp_path)
    adapter.detach()
    with torch.no_grad():
        without = base.model(input_ids=torch.tensor([TOKENS])).logits[0]
    assert relative_error(plain, without) < 1e-4
    oracle = PeftOracle(base_directory, tmp_path)
    assert relative_error(moved, oracle.logits(TOKENS)) < 1e-4


def test_lora_plus_gives_b_a_rate_of_its_own(base: Base) -> None:
    config = run_of(rank=2, optim={"steps": 1, "b_rate_ratio": 16.0})
    adapter = attach(base, config)
    assert isinstance(adapter, LowRankAdapter)
    slow, fast = adapter.groups(16.0)
    assert {id(p) for p in fast["params"]} == {id(layer.B) for layer in adapter.layers.values()}
    assert len(slow["params"]) + len(fast["params"]) == len(adapter.parameters())
    assert (slow["ratio"], fast["ratio"]) == (1.0, 16.0)
    adapter.detach()


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("vblora", {"vector_length": 7}, "vector_length 7"),
        ("oft", {"block_size": 7}, "block_size 7"),
        ("adalora", {"rank": 9, "initial_rank": 3}, "initial_rank 3"),
        ("ia3", {"targets": ("nowhere",)}, "nowhere"),
        ("ln_tuning", {"targets": ("nowhere",)}, "nowhere"),
        ("lora", {"rank": 250, "init": "pissa"}, "rank 250"),
        ("bottleneck", {"activation": "loud"}, "activation 'loud'"),
    ],
)
def test_what_the_base_has_no_place_for_is_refused(
    base: Base, kind: str, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(MethodError, match=said):
        attach(base, run_of(kind, **fields))
    base.model(input_ids=torch.tensor([TOKENS]))  # still whole


def test_a_b_rate_is_refused_where_there_is_no_b(base: Base) -> None:
    adapter = attach(base, run_of("ia3"))
    with pytest.raises(MethodError, match="b_rate_ratio"):
        adapter.groups(4.0)
    adapter.detach()
