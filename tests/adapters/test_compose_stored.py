"""New adapters made of stored ones, against PEFT's `add_weighted_adapter` itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from adapters.compose import Part
from adapters.compose_stored import FULL, METHODS, PRUNING, Composition, compose_stored, plan
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.validate import validate
from base.spec import BaseSpec
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import make_adapter, make_base, read_manifest

WEIGHTS = "adapter_model.safetensors"
SEED, DENSITY = 11, 0.6
TARGETS = ["embed_tokens", "q_proj", "down_proj"]
SHARES = (0.7, -0.4, 1.3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(make_base(tmp_path_factory.mktemp("base") / "tiny", "llama"))


@pytest.fixture(scope="module")
def spec(server: Server) -> BaseSpec:
    return server.base.spec


@pytest.fixture(scope="module")
def make(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Part, Path]]:
    def one(weight: float = 1.0, **options: Any) -> tuple[Part, Path]:
        path = tmp_path_factory.mktemp("part") / "part"
        make_adapter(path, server.directory, **{"targets": TARGETS, **options})
        return Part(read_manifest(path, server.base.spec), weight), path / WEIGHTS

    return one


@pytest.fixture(scope="module")
def equal_ranks(make: Callable[..., Any]) -> list[tuple[Part, Path]]:
    return [make(weight, rank=4, seed=n, alpha=3 + n) for n, weight in enumerate(SHARES)]


def composed(
    parts: list[tuple[Part, Path]], how: Composition, spec: BaseSpec, home: Path
) -> dict[str, Tensor]:
    """Module path -> B A of the new adapter, which every check of an upload accepts."""
    config, weights = compose_stored(parts, how, spec, Limits(), home)
    found = validate(config, weights, spec, Limits())
    assert found.kind == "lora"
    tensors = load_file(str(weights))
    deltas = {}
    for path in found.targets:
        start = f"base_model.model.{path}.lora_"
        names = (
            ("embedding_A", "embedding_B") if path in spec.embeddings else ("A.weight", "B.weight")
        )
        A, B = (tensors[start + name] for name in names)
        rank = found.config["rank_pattern"].get(path, found.config["r"])
        alpha = found.config["alpha_pattern"].get(path, found.config["lora_alpha"])
        assert alpha == rank == A.shape[0]
        deltas[path] = B @ A
    return deltas


def by_peft(
    directory: Path, parts: list[tuple[Part, Path]], monkeypatch: pytest.MonkeyPatch, **how: Any
) -> dict[str, Tensor]:
    """The same of `add_weighted_adapter`, its generator seeded where it begins to draw."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        found = PeftModel.from_pretrained(model, str(parts[0][1].parent), adapter_name="p0")
        for n, (_, path) in enumerate(parts[1:], 1):
            found.load_adapter(str(path.parent), adapter_name=f"p{n}")
        lora = found.base_model
        inject = lora.inject_adapter

        def injected(*arguments: Any, **named: Any) -> None:
            inject(*arguments, **named)
            torch.manual_seed(SEED)  # a new adapter's own beginning is drawn too

        monkeypatch.setattr(lora, "inject_adapter", injected)
        names = [f"p{n}" for n in range(len(parts))]
        weights = [part.weight for part, _ in parts]
        lora.add_weighted_adapter(names, weights, "new", svd_full_matrices=False, **how)
    deltas = {}
    for name, module in lora.model.named_modules():
        if isinstance(module, LoraLayer) and "new" in module.scaling:
            delta = module.get_delta_weight("new").detach()
            deltas[name] = delta.t() if "embed" in name else delta
    return deltas


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_pefts(
    server: Server,
    spec: BaseSpec,
    equal_ranks: list[tuple[Part, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Element by element, the random masks of the same seed among them."""
    density = DENSITY if method in PRUNING else 1.0
    reduces = method.endswith("svd")
    how = Composition(method, density, 3 if reduces else None, SEED, "frequency")
    got = composed(equal_ranks, how, spec, tmp_path)
    wanted = by_peft(
        server.directory,
        equal_ranks,
        monkeypatch,
        combination_type={"concatenate": "cat"}.get(method, method),
        density=density,
        svd_rank=3 if reduces else None,
        majority_sign_method="frequency",
    )
    assert set(got) == set(wanted)
    for path, delta in wanted.items():
        assert torch.allclose(got[path], delta, rtol=1e-4, atol=1e-5 * float(delta.abs().max()))


def test_a_seed_decides_the_masks(
    spec: BaseSpec, equal_ranks: list[tuple[Part, Path]], tmp_path: Path
) -> None:
    one, same, other = (
        composed(equal_ranks, Composition("dare_linear", 0.5, seed=seed), spec, tmp_path)
        for seed in (1, 1, 2)
    )
    path = next(iter(one))
    assert torch.equal(one[path], same[path])
    assert not torch.allclose(one[path], other[path])


def test_concatenation_takes_any_ranks_and_scales(
    spec: BaseSpec, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Ranks, rsLoRA, patterns and targets that PEFT's own `cat` gets wrong or refuses."""
    parts = [
        make(0.5, rank=2, seed=1),
        make(2.0, kind="rslora", rank=6, seed=2, targets=["q_proj", "o_proj"]),
        make(-1.0, rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 2}, seed=3),
    ]
    got = composed(parts, Composition("concatenate"), spec, tmp_path)
    for path, delta in got.items():
        wanted = torch.zeros_like(delta)
        for part, file in parts:
            wanted += part.weight * _delta(part, file, path, delta)
        assert torch.allclose(delta, wanted, atol=1e-6)
    full = composed(parts, Composition("svd", rank=13), spec, tmp_path)
    assert all(torch.allclose(full[path], got[path], atol=1e-5) for path in got)


def _delta(part: Part, file: Path, path: str, like: Tensor) -> Tensor:
    config = part.manifest.config
    if path not in config["target_modules"]:
        return torch.zeros_like(like)
    names = ["embedding_A", "embedding_B"] if "embed" in path else ["A.weight", "B.weight"]
    with safe_open(str(file), "pt") as tensors:  # type: ignore[no-untyped-call]
        A, B = (tensors.get_tensor(f"base_model.model.{path}.lora_{name}") for name in names)
    rank = A.shape[0]
    alpha = config["alpha_pattern"].get(path, config["lora_alpha"])
    found: Tensor = B @ A * (alpha / (rank**0.5 if config["use_rslora"] else rank))
    return found


@pytest.mark.parametrize(
    ("options", "method", "says"),
    [
        ({"kind": "dora"}, "concatenate", "use_dora=false"),
        ({"kind": "ia3", "targets": ["q_proj"]}, "svd", "no plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "svd", "modules_to_save"),
        ({"lora_bias": True, "targets": ["q_proj"]}, "linear", "lora_bias"),
        ({"rank": 3}, "ties", "ranks 4, 3; take concatenate or svd"),
        ({"rank": 254}, "concatenate", "rank 258, limit 256"),
    ],
)
def test_what_does_not_compose(
    spec: BaseSpec,
    make: Callable[..., Any],
    equal_ranks: list[tuple[Part, Path]],
    options: dict[str, Any],
    method: str,
    says: str,
) -> None:
    parts = [equal_ranks[0][0], make(1.0, **options)[0]]
    with pytest.raises(InvalidAdapter, match=says):
        plan(parts, Composition(method), spec, Limits())


def test_limits_say_their_numbers(
    spec: BaseSpec, equal_ranks: list[tuple[Part, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part for part, _ in equal_ranks]
    with pytest.raises(InvalidAdapter, match=r"would take \d+ bytes, limit 1000"):
        plan(parts, Composition("svd"), spec, replace(Limits(), max_weights_bytes=1000))
    monkeypatch.setattr("adapters.compose_stored.MAX_DELTA_BYTES", 1000)
    for method in FULL:
        with pytest.raises(InvalidAdapter, match=r"\d+ bytes, limit 1000"):
            plan(parts, Composition(method), spec, Limits())
    plan(parts, Composition("svd"), spec, Limits())


def test_peft_loads_what_was_written(
    server: Server, spec: BaseSpec, equal_ranks: list[tuple[Part, Path]], tmp_path: Path
) -> None:
    from tests.oracle import PeftOracle, random_tokens, relative_error

    config, _ = compose_stored(equal_ranks, Composition("ties", 0.5), spec, Limits(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(config)))
    tokens = random_tokens(12)
    (row,) = server.run([(tokens, server.lower(tmp_path))])
    assert relative_error(row, PeftOracle(server.base, tmp_path).logits(tokens)) < 1e-5


@pytest.mark.parametrize("method", ["dare_linear", "dare_linear_svd", "dare_ties_svd"])
def test_numbers_that_are_no_longer_finite_are_refused(
    equal_ranks: list[tuple[Part, Path]], spec: BaseSpec, tmp_path: Path, method: str
) -> None:
    how = Composition(method, density=5e-324, rank=2 if method.endswith("svd") else None, seed=1)
    with pytest.raises(InvalidAdapter, match=r"not finite.*density nearer to 1"):
        compose_stored(equal_ranks, how, spec, Limits(), tmp_path)
