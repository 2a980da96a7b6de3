"""Sums of adapters against PEFT: each part merged alone by PEFT, and the differences added."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters.compose import Part, check_sum, why_not
from adapters.delta import LinearDelta, LoweredAdapter
from adapters.errors import InvalidAdapter
from adapters.lowering.composed import compose
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    ATTENTION,
    PeftOracle,
    make_adapter,
    random_tokens,
    read_manifest,
    relative_error,
)

Servers = Callable[..., Server]
Weighted = Sequence[tuple[Path, float]]
TOKENS = random_tokens(24, seed=5)

# name -> what each part is made with, and its weight
SUMS: dict[str, list[tuple[dict[str, Any], float]]] = {
    "three ranks": [({"rank": 2}, 0.7), ({"rank": 5}, 0.3), ({"rank": 8}, -0.25)],
    "rsLoRA and patterns": [
        ({"kind": "rslora", "rank": 6}, 0.5),
        ({"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"k_proj": 3}}, 2.0),
    ],
    "different targets": [({"targets": ["q_proj"]}, 1.0), ({"targets": ["up_proj", "q_proj"]}, 1)],
    "embeddings and head": [
        ({"targets": ["embed_tokens", "lm_head", "v_proj"]}, 0.6),
        ({"targets": ["embed_tokens", "v_proj"], "rank": 3}, 0.4),
    ],
    "biases": [
        ({"lora_bias": True, "targets": ATTENTION}, 0.5),
        ({"bias": "all", "targets": ["q_proj"]}, 0.5),
        ({}, 0.25),
    ],
    "other low-rank kinds": [
        ({"kind": "loha", "rank": 3}, 0.6),
        ({"kind": "vera", "rank": 8}, 0.5),
        ({"kind": "vera", "rank": 8, "projection_prng_key": 3}, 0.5),
        ({"kind": "adalora"}, 0.2),
        ({"kind": "miss"}, 0.3),
        ({"kind": "beft", "targets": ["k_proj"]}, 0.7),
    ],
    "one, scaled": [({}, 1.7)],
}


def made(server: Server, parts: Sequence[tuple[dict[str, Any], float]], home: Path) -> Weighted:
    return [
        (make_adapter(home / f"part{n}", server.directory, seed=n + 1, **options), weight)
        for n, (options, weight) in enumerate(parts)
    ]


def summed(server: Server, parts: Weighted) -> LoweredAdapter:
    return compose("d" * 64, [(server.lower(path), weight) for path, weight in parts], server.base)


def oracle(server: Server, parts: Weighted) -> PeftOracle:
    """W + Σ w_i (W_i - W), where PEFT merged W_i = W + Δ_i in float32."""
    found = PeftOracle(server.base)
    own = {name: tensor.double() for name, tensor in found.model.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in own.items()}
    for path, weight in parts:
        merged = PeftOracle(server.base, path, merged="float32").model.state_dict()
        for name, tensor in merged.items():
            total[name] += weight * (tensor.double() - own[name])
    found.model.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    return found


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_what_peft_would_add(server: Servers, tmp_path: Path, name: str) -> None:
    """In a batch with its first part alone and the bare base, so that nothing leaks."""
    here = server("qwen3")
    parts = made(here, SUMS[name], tmp_path)
    both, first = summed(here, parts), here.lower(parts[0][0])
    rows = here.run([(TOKENS, both), (TOKENS[:7], None), (TOKENS[3:], first)])
    assert relative_error(rows[0], oracle(here, parts).logits(TOKENS)) < 1e-5
    assert relative_error(rows[1], PeftOracle(here.base).logits(TOKENS[:7])) < 1e-5
    alone = PeftOracle(here.base, parts[0][0]).logits(TOKENS[3:])
    assert relative_error(rows[2], alone) < 1e-5
    assert relative_error(rows[0][3:], alone) > 1e-3, "the weights do something"


def test_peft_with_both_active_says_the_same(server: Servers, tmp_path: Path) -> None:
    """PEFT's own way to serve two LoRAs at once, which has no weights of its own: its scales."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    here = server("qwen3")
    parts = made(here, SUMS["three ranks"], tmp_path)
    found = PeftOracle(here.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of transformers' newer names
        model = PeftModel.from_pretrained(found.model, str(parts[0][0]), adapter_name="0")
        for n, (path, _) in enumerate(parts[1:], 1):
            model.load_adapter(str(path), adapter_name=str(n))
    model.base_model.set_adapter([str(n) for n in range(len(parts))])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for n, (_, weight) in enumerate(parts):
                module.scaling[str(n)] *= weight
    found.model = model.eval()
    (row,) = here.run([(TOKENS, summed(here, parts))])
    assert relative_error(row, found.logits(TOKENS)) < 1e-5


def test_ranks_stand_side_by_side(server: Servers, tmp_path: Path) -> None:
    here = server("qwen3")
    both = summed(here, made(here, SUMS["three ranks"], tmp_path))
    assert both.rank == 2 + 5 + 8
    for delta in both.deltas.values():
        assert isinstance(delta, LinearDelta)
        assert len(delta.low_rank) == 1, "one product for the whole sum"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"kind": "dora"}, "use_dora=false"),
    "ia3": ({"kind": "ia3"}, "multiplies"),
    "ln_tuning": ({"kind": "ln_tuning", "targets": ["input_layernorm"]}, "norm"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_add_is_refused_twice(server: Servers, tmp_path: Path, name: str) -> None:
    """At the door by the manifest, with what to do instead; and where a door is forgotten, when
    it is lowered."""
    options, says = REFUSED[name]
    here = server("qwen3")
    parts = made(here, [(options, 0.5), ({}, 0.5)], tmp_path)
    manifests = [read_manifest(path, here.base.spec) for path, _ in parts]
    with pytest.raises(InvalidAdapter, match=says) as caught:
        check_sum([Part(manifest, 0.5) for manifest in manifests], 256, 1 << 30)
    assert "part0@1" in caught.value.reason
    assert "alone" in caught.value.reason
    with pytest.raises(InvalidAdapter):
        summed(here, parts)


def test_merged_and_too_large(server: Servers, tmp_path: Path) -> None:
    here = server("qwen3")
    (path, _), (other, _) = made(here, [({"rank": 5}, 1), ({"rank": 8}, 1)], tmp_path)
    one, two = (read_manifest(p, here.base.spec) for p in (path, other))
    assert "unmerged" in why_not(read_manifest(path, here.base.spec, placement="merged"))
    parts = [Part(one, 1.0), Part(two, 1.0)]
    check_sum(parts, 13, one.memory_bytes + two.memory_bytes)
    with pytest.raises(InvalidAdapter, match=r"5 \+ 8 = 13 together, limit 12"):
        check_sum(parts, 12, 1 << 30)
    numbers = rf"{one.memory_bytes} \+ {two.memory_bytes} = {one.memory_bytes + two.memory_bytes} "
    with pytest.raises(InvalidAdapter, match=numbers + "bytes together, limit 99"):
        check_sum(parts, 256, 99)


def test_a_sum_holds_its_own_tensors_once(server: Servers, tmp_path: Path) -> None:
    here = server("qwen3")
    parts = made(here, SUMS["three ranks"], tmp_path)
    alone = sum(here.lower(path).nbytes for path, _ in parts)
    assert summed(here, parts).nbytes == alone
