"""Each family but LoRA, through validation, lowering and a whole model, against PEFT alone.

PEFT's own mixed batch applies the active adapter to every row for these methods, without a word:
so the oracle is always one adapter at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.delta import Delta, LinearDelta, LoweredAdapter, PrivateLinear, PrivateNorm
from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.lowering import lower
from adapters.lowering.shared import _held
from adapters.methods import METHODS
from adapters.store import AdapterStore
from service.conformance.recipes import RECIPES
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    ATTENTION,
    FEED_FORWARD,
    PeftOracle,
    edit_adapter,
    make_adapter,
    random_tokens,
    read_manifest,
    relative_error,
)

Servers = Callable[..., Server]
BOUND = 1e-5  # of logits, relative; measured 3e-7 to 4e-6
BOUNDS = {"randlora": 4e-5}  # its bases are summed at full rank: measured 1.1e-5 to 1.5e-5
Q0 = "model.layers.0.self_attn.q_proj"
PRUNED = {
    f"{Q0}.lora_E": [True, False, True, False],
    f"{Q0[:-6]}v_proj.lora_E": [False] * 3 + [True],
}
NORMS = ["input_layernorm", "model.norm"]

# kind -> variants of make_adapter's options
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "ia3": {
        "every linear": {},
        "attention alone": {"targets": ATTENTION},
        "feed-forward alone": {"targets": FEED_FORWARD},
        "feed-forward on the output": {"feedforward_modules": []},
        "feed-forward as regex": {"feedforward_modules": r".*\.(up|o)_proj"},
        "attention on the input": {"targets": ATTENTION, "feedforward_modules": list(ATTENTION)},
        "lm_head": {"targets": ["lm_head", "q_proj"]},
        "all-linear": {"targets": "all-linear", "feedforward_modules": ".*down_proj"},
        "exclude_modules": {"exclude_modules": ["layers.1.mlp.up_proj"]},
        "modules_to_save": {"targets": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    },
    "loha": {
        "every linear": {},
        "rank of one": {"rank": 1, "alpha": 3},
        "patterns": {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"down_proj": 9, r"layers\.\d+\.self_attn\.k_proj": 1},
        },
        "layers_to_transform": {"layers_to_transform": [1]},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    },
    "adalora": {
        "every linear": {},
        "alpha other than rank": {"rank": 6, "alpha": 5},
        "pruned": {"rank_pattern": PRUNED},
        "layers_to_transform": {"layers_to_transform": 0, "targets": ATTENTION},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["model.norm"]},
    },
    "vera": {
        "every linear": {},
        "saved without its projections": {"save_projection": False, "projection_prng_key": 7},
        "one size": {"targets": ["o_proj"], "rank": 3},
        "layers_to_transform": {"layers_to_transform": [0], "targets": FEED_FORWARD},
        "lm_head": {"targets": ["lm_head", "q_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["norm"]},
    },
    "vblora": {
        "every linear": {},
        "best of one": {"topk": 1, "rank": 2},
        "the whole bank": {"topk": 12, "vector_length": 32},
        "layers_to_transform": {"layers_to_transform": [1], "targets": ATTENTION},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    },
    "miss": {
        "every linear": {},
        "a rank that does not divide": {"rank": 7},
        "mini": {"init_weights": "mini", "mini_r": 16},
        "layers_to_transform": {"layers_to_transform": [1], "targets": ATTENTION},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["norm"]},
    },
    "hra": {
        "every linear": {},
        "Gram-Schmidt": {"apply_GS": True, "init_weights": False},
        "odd rank": {"rank": 5, "init_weights": False},
        "layers_to_transform": {"layers_to_transform": [1], "targets": ATTENTION},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["norm"]},
    },
    "delora": {
        "every linear": {},
        "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 5}},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    },
    "gralora": {
        "every linear": {},
        "hybrid": {"hybrid_r": 3, "rank": 8, "gralora_k": 4},
        "one block": {"gralora_k": 1},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "deft": {
        "every linear": {},
        "QR": {"decomposition_method": "qr", "alpha": None},
        "projection alone": {"para": True},
        "wider than the layer": {"rank": 40, "targets": ["k_proj"]},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "hira": {
        "every linear": {},
        "a pattern, which PEFT does not apply": {"rank_pattern": {"q_proj": 2}},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["norm"]},
    },
    "c3a": {
        "every linear": {},
        "patterns": {"block_size_pattern": {"q_proj": 32, "mlp.up_proj": 64}},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "fourierft": {
        "every linear": {},
        "patterns": {"n_frequency_pattern": {"q_proj": 32, "mlp.up_proj": 4096}},
        "another seed": {"random_loc_seed": 3, "scaling": 300.0},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "supertuning": {
        "every linear": {},
        "without a LoRA": {"rank": None, "alpha": 0, "lora_alpha": None, "sparsity": 0.5},
        "the smallest": {"select_top": False, "targets": ["lm_head", "up_proj"]},
    },
    "tinylora": {
        "every linear": {},
        "tied": {"weight_tying": 0.6, "save_projection": False, "targets": ATTENTION},
        "wider than the layer": {"rank": 40, "targets": ["k_proj"]},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "unilora": {
        "every linear": {},
        "a longer vector": {"theta_d_length": 100_000, "proj_seed": 5, "targets": FEED_FORWARD},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "pvera": {
        "every linear": {},
        "saved without its projections": {"save_projection": False, "projection_prng_key": 7},
        "lm_head": {"targets": ["lm_head", "q_proj"]},
    },
    "lokr": {
        "every linear": {},
        "as a LoRA": {"rank": 1, "decompose_factor": 2},
        "both of low rank": {"rank": 2, "decompose_both": True},
        "patterns": {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 1},
            "alpha_pattern": {"down_proj": 9},
        },
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "glora": {
        "every linear": {},
        "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "constants": {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        "bias alone": {"config_A_B": "none", "targets": ["q_proj", "v_proj"], "strength": 0.5},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "waveft": {
        "every linear": {},
        "proportional": {"proportional_parameters": True},
        "patterns": {"n_frequency_pattern": {"q_proj": 32}, "random_loc_seed": 5},
        "without a transform": {"use_idwt": False, "targets": ["v_proj", "down_proj"]},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "randlora": {
        "every linear": {},
        "a rank that does not divide": {"rank": 7},
        "sparse": {"sparse": True, "targets": ["down_proj", "k_proj"]},
        "lm_head": {"targets": ["lm_head", "up_proj"]},
    },
    "beft": {
        "every linear": {},
        "lm_head": {"targets": ["lm_head", "v_proj"]},
        "modules_to_save": {"targets": ["v_proj"], "modules_to_save": ["norm"]},
    },
    "oft": {
        "every linear": {},
        "one block for all, by Cayley's own transform": {
            "block_share": True,
            "use_cayley_neumann": False,
            "modules_to_save": ["norm"],
        },
        "by the number of blocks, constrained": {
            "r": 5,  # which gives way to 4
            "oft_block_size": 0,
            "coft": True,
            "eps": 1.5,
        },
        "a size that does not divide": {
            "oft_block_size": 24,
            "num_cayley_neumann_terms": 2,
            "targets": ["lm_head", "down_proj"],
            "layers_to_transform": [1],
        },
    },
    "boft": {
        "every linear": {},
        "three factors": {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
        "by the number of blocks": {
            "boft_block_size": 0,
            "boft_block_num": 4,
            "boft_n_butterfly_factor": 2,
            "targets": ["lm_head", "up_proj"],
            "modules_to_save": ["norm"],
        },
    },
    "road": {
        "every linear": {},
        "road_2 in large groups": {"variant": "road_2", "group_size": 32},
        "road_4": {
            "variant": "road_4",
            "targets": ["lm_head", "v_proj"],
            "modules_to_save": ["norm"],
        },
    },
    "shira": {
        "every linear": {},
        "lm_head": {"targets": ["lm_head", "k_proj"], "rank": 2, "modules_to_save": ["norm"]},
    },
    "peanut": {
        "every linear": {},
        "no hidden layer": {"depth": 0, "act_fn": "tanh", "targets": ["lm_head", "up_proj"]},
        "three hidden layers": {"depth": 3, "act_fn": "gelu", "modules_to_save": ["norm"]},
    },
    "poly": {
        "every linear": {},
        "in splits": {
            "n_splits": 4,
            "n_skills": 3,
            "targets": ["lm_head", "o_proj"],
            "modules_to_save": ["norm"],
        },
    },
    "ln_tuning": {
        "some norms": {"targets": NORMS},
        "norms as regex": {"targets": r".*layernorm"},
        "modules_to_save": {"targets": NORMS, "modules_to_save": ["lm_head"]},
    },
}
CASES = [(kind, name) for kind, variants in VARIANTS.items() for name in variants]
KINDS = {kind: next(iter(variants.values())) for kind, variants in VARIANTS.items()}


def made(served: Server, path: Path, kind: str, **options: Any) -> Path:
    return make_adapter(path, served.directory, kind, **{**KINDS[kind], **options})


PROMPTS = [random_tokens(n, seed=n) for n in (5, 17, 9, 3, 11)]
Neighbour = tuple[LoweredAdapter | None, torch.Tensor]


@pytest.fixture(scope="module")
def neighbours(
    server: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Neighbour]]:
    """What stands before, between and after the adapter: a LoRA, the base, a DoRA."""

    @cache
    def make(architecture: str) -> list[Neighbour]:
        directory, served = tmp_path_factory.mktemp("neighbours"), server(architecture)
        lora = make_adapter(directory / "lora", served.directory, "lora", seed=1)
        dora = make_adapter(directory / "dora", served.directory, "dora", seed=2)
        return [
            (d and served.lower(d), PeftOracle(served.directory, d).logits(PROMPTS[at]))
            for at, d in ((0, lora), (2, None), (3, dora))
        ]

    return make


# qwen3 has biases, llama has none
@pytest.mark.parametrize(
    ("architecture", "kind", "variant"),
    [("qwen3", *case) for case in CASES]
    + [("llama", kind, next(iter(VARIANTS[kind]))) for kind in VARIANTS],
)
def test_equals_peft_alone_in_a_mixed_batch(
    architecture: str,
    kind: str,
    variant: str,
    server: Servers,
    neighbours: Callable[[str], list[Neighbour]],
    tmp_path: Path,
) -> None:
    served, (lora, base, dora) = server(architecture), neighbours(architecture)
    adapter = make_adapter(tmp_path / "a", served.directory, kind, **VARIANTS[kind][variant])
    lowered, oracle = served.lower(adapter), PeftOracle(served.directory, adapter)
    batch = [lora[0], lowered, base[0], dora[0], lowered]
    got = served.run(list(zip(PROMPTS, batch, strict=True)))
    want = [lora[1], oracle.logits(PROMPTS[1]), base[1], dora[1], oracle.logits(PROMPTS[4])]
    for logits, expected in zip(got, want, strict=True):
        assert relative_error(logits, expected) < BOUNDS.get(kind, BOUND)
    alone = served.run([(PROMPTS[1], None)])[0]
    assert relative_error(got[1], alone) > 1e-2  # the adapter says something


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_memory_is_what_the_lowered_adapter_holds(
    kind: str, variant: str, server: Servers, tmp_path: Path
) -> None:
    served = server("qwen3")
    adapter = make_adapter(tmp_path / "a", served.directory, kind, **VARIANTS[kind][variant])
    lowered = served.lower(adapter)
    manifest = read_manifest(adapter, served.base.spec)
    assert manifest.memory_bytes == lowered.nbytes
    assert (manifest.kind, manifest.rank) == (kind, lowered.rank)


ONE = {"ln_tuning": ["layers.0.input_layernorm"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_registry_says_what_one_target_costs(
    kind: str, server: Servers, tmp_path: Path
) -> None:
    served = server("llama")  # without biases, which cost extra where they are scaled
    adapter = made(served, tmp_path / "a", kind, targets=ONE.get(kind, [f"{Q0}"]))
    lowered, spec = served.lower(adapter), served.base.spec
    manifest, row = read_manifest(adapter, spec), METHODS[kind.upper()]
    (path,) = manifest.targets
    shape = spec.linears.get(path)
    sizes = {"m": shape.out_features, "n": shape.in_features} if shape else {"m": spec.norms[path]}
    numbers = {"r": manifest.rank, "rank": manifest.rank, **manifest.config, **sizes}
    assert lowered.nbytes == eval(row.memory, {}, numbers) + eval(row.shared, {}, numbers)
    assert flops(lowered.deltas[path]) == eval(row.flops, {}, numbers)


def flops(delta: Delta) -> int:
    """Per token: of the products, and one or two for each number that is scaled and added."""
    if isinstance(delta, PrivateLinear):
        assert isinstance(delta.weight, torch.Tensor)
        return 2 * delta.weight.numel()
    if not isinstance(delta, LinearDelta):
        return 0
    total = 0
    for term in delta.low_rank:
        total += 2 * (term.A.numel() + term.B.numel())
        total += 0 if term.d is None else term.d.numel()
        total += 0 if term.s is None else 2 * term.s.numel()
    total += sum(2 * block_map.blocks.numel() for block_map in delta.blocks)
    total += 0 if delta.sparse is None else 2 * delta.sparse.values.numel()
    total += 0 if delta.pairs is None else 3 * delta.pairs.own.numel()
    vectors = (delta.g, delta.p, delta.bias)
    return total + sum(vector.numel() for vector in vectors if vector is not None)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not RECIPES[kind].begins_random])
def test_as_initialised_it_equals_the_base(kind: str, server: Servers, tmp_path: Path) -> None:
    served, tokens = server("qwen3"), random_tokens(20)
    adapter = made(served, tmp_path / "a", kind, zero=True)
    got = served.run([(tokens, served.lower(adapter)), (tokens, None)])
    assert relative_error(got[0], got[1]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_merged_in_float32_equals_unmerged(
    architecture: str, kind: str, server: Servers, tmp_path: Path
) -> None:
    served, tokens = server(architecture), random_tokens(20)
    adapter = made(served, tmp_path / "a", kind)
    merged = served.lower(adapter, placement="merged", merged_dtype="float32")
    assert not any(isinstance(d, LinearDelta) and d.low_rank for d in merged.deltas.values())
    got = served.run([(tokens, served.lower(adapter)), (tokens, merged)])
    assert relative_error(got[0], got[1]) < BOUND
    if kind in ("beft", "poly"):
        return  # PEFT cannot merge a bias into a layer that has none, nor Poly at all
    want = PeftOracle(served.directory, adapter, merged="float32").logits(tokens)
    assert relative_error(got[1], want) < BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_through_the_store(kind: str, server: Servers, tmp_path: Path) -> None:
    """PEFT saves, the store checks and keeps, lowering reads what the store gives."""
    served, tokens = server("qwen3"), random_tokens(12)
    adapter = made(served, tmp_path / "a", kind)
    store = AdapterStore(str(tmp_path / "blobs"), f"sqlite:///{tmp_path / 'catalog.db'}")
    store.add(
        "mine",
        (adapter / "adapter_config.json").read_bytes(),
        adapter / "adapter_model.safetensors",
        None,
        served.base.spec,
        Limits(),
    )
    manifest = store.resolve("mine")
    lowered = lower(manifest, store.weights_path(manifest), served.base)
    got = served.run([(tokens, lowered)])[0]
    assert relative_error(got, PeftOracle(served.directory, adapter).logits(tokens)) < BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_consumed(kind: str, server: Servers, tmp_path: Path) -> None:
    """By lowering too, which reads files that it did not check itself."""
    served = server("qwen3")
    adapter = made(served, tmp_path / "a", kind)
    weights = adapter / "adapter_model.safetensors"
    manifest = read_manifest(adapter, served.base.spec)
    name, tensor = next(iter(load_file(str(weights)).items()))
    edit_adapter(adapter, tensors={f"{name}.more": torch.ones(3)})
    with pytest.raises(InvalidAdapter, match="left over") as caught:
        lower(manifest, weights, served.base)
    assert caught.value.where == f"{name}.more"
    edit_adapter(adapter, tensors={f"{name}.more": None, name: torch.cat([tensor, tensor])})
    with pytest.raises(InvalidAdapter, match="shape") as caught:
        lower(manifest, weights, served.base)
    assert caught.value.where == name


def test_vera_shares_its_matrices(server: Servers, tmp_path: Path) -> None:
    """Between layers of one size, between adapters of one seed, saved with the file or not."""
    served = server("qwen3")
    terms = []
    for name, options in (
        ("a", {"seed": 1}),
        ("b", {"seed": 2}),
        ("c", {"seed": 3, "save_projection": False}),
        ("d", {"seed": 4, "projection_prng_key": 5}),
    ):
        adapter = make_adapter(tmp_path / name, served.directory, "vera", **options)
        lowered = served.lower(adapter)
        for delta in (lowered.deltas[Q0], lowered.deltas[Q0.replace("layers.0", "layers.1")]):
            assert isinstance(delta, LinearDelta)
            terms.append(delta.low_rank[0])
    kept = {(term.A.data_ptr(), term.B.data_ptr()) for term in terms[:6]}
    assert len(kept) == 1
    assert {(term.A.data_ptr(), term.B.data_ptr()) for term in terms[6:]}.isdisjoint(kept)
    # What the kernels hold is the very same memory.
    layer = served.context.layers[Q0]
    prepared = layer.prepare(LinearDelta((terms[0],)))
    assert prepared.beside[0].term.b.data_ptr() == terms[0].B.data_ptr()
    assert prepared.beside[0].term.a.data_ptr() == terms[0].A.data_ptr()


def test_shared_matrices_leave_with_their_last_adapter(server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    options = {"projection_prng_key": 99, "targets": ["q_proj"]}
    lowered = served.lower(make_adapter(tmp_path / "a", served.directory, "vera", **options))
    delta = lowered.deltas[Q0]
    assert isinstance(delta, LinearDelta)
    pointer = delta.low_rank[0].A.data_ptr()
    assert pointer in {tensor.data_ptr() for tensor in _held.values()}
    del delta, lowered
    assert pointer not in {tensor.data_ptr() for tensor in _held.values()}


def test_ln_tuning_is_the_norms_alone(server: Servers, tmp_path: Path) -> None:
    lowered = server("qwen3").lower(made(server("qwen3"), tmp_path / "a", "ln_tuning"))
    assert all(isinstance(delta, PrivateNorm) for delta in lowered.deltas.values())
    assert len(lowered.deltas) == 3


def test_a_table_that_is_not_the_base_s_is_refused(server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    adapter = make_adapter(tmp_path / "a", served.directory, "ia3", targets=["lm_head"])
    name = "base_model.model.lm_head.base_layer.weight"
    copy = load_file(str(adapter / "adapter_model.safetensors"))[name]
    edit_adapter(adapter, tensors={name: copy + 1})
    with pytest.raises(InvalidAdapter, match=r"lm_head\.base_layer\.weight: differs"):
        served.lower(adapter)
