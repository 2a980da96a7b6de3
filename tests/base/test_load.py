"""load_base against transformers' own loading, on tiny random checkpoints."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
)

from base.checkpoint import Checkpoint
from base.errors import UnservableBase
from base.kernels import fast_status
from base.load import Base, load_base
from base.nf4 import NF4Linear
from tests.base.tiny import CONFIGS, SIZES, save_tiny, save_tokenizer

IDS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, directory: Path, cache: Path) -> None:
    """Everything but the quantised weights comes out as from_pretrained loads it."""
    save_tiny(CONFIGS[name], directory)
    assert_equal_to_transformers(load_base(directory, cache_dir=cache), directory)


def test_double_quantisation_and_plain_scales(directory: Path, cache: Path) -> None:
    """What nobody asks otherwise about is double-quantised; each says the other's fingerprint."""
    save_tiny(CONFIGS["qwen3"], directory)
    base = load_base(directory, cache_dir=cache)
    plain = load_base(directory, double_quant=False, cache_dir=cache)
    for one, double in ((base, True), (plain, False)):
        assert one.spec.double_quant == double
        assert {nf4_linear(one, path).weight.is_nested for path in quantised(one)} == {double}
    assert (base.spec.twin, plain.spec.twin) == (plain.spec.fingerprint, base.spec.fingerprint)
    assert_equal_to_transformers(plain, directory)


def test_rows_that_are_no_multiple_of_a_block(directory: Path, cache: Path) -> None:
    config = LlamaConfig(**{**SIZES, "hidden_size": 72, "head_dim": 18, "intermediate_size": 100})
    save_tiny(config, directory)
    assert_equal_to_transformers(load_base(directory, cache_dir=cache), directory)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_compute_in_bfloat16(stored: torch.dtype, directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["gemma2"], directory, dtype=stored)
    base = load_base(directory, dtype="bfloat16", cache_dir=cache)
    assert base.dtype == torch.bfloat16
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert_equal_to_transformers(base, directory, rtol=2e-2, atol=2e-2)


def test_a_layer_that_keeps_its_weight_transposed(directory: Path, cache: Path) -> None:
    """GPT-2's Conv1D holds [in, out]; as a base it is a linear layer like any other."""
    config = GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=2, n_positions=128, eos_token_id=2
    )
    save_tiny(config, directory)
    base = load_base(directory, cache_dir=cache)
    shape = base.spec.linears["transformer.h.0.mlp.c_fc"]
    assert (shape.out_features, shape.in_features, shape.bias) == (256, 64, True)
    assert_equal_to_transformers(base, directory)


def test_shards(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["llama"], directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert_equal_to_transformers(load_base(directory, cache_dir=cache), directory)


def test_keys_without_the_prefix_of_the_model(directory: Path, cache: Path) -> None:
    """Checkpoints of the bare decoder say `layers.0…` for `model.layers.0…`."""
    save_tiny(CONFIGS["qwen3"], directory)
    rewrite(directory, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    assert_equal_to_transformers(load_base(directory, cache_dir=cache), directory)


def test_the_spec(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    spec = load_base(directory, cache_dir=cache).spec
    assert (spec.id, spec.revision, spec.architecture) == ("base", "", "qwen3")
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (2, 4, 2, 32)
    assert (spec.hidden_size, spec.vocab_size, spec.max_positions) == (64, 320, 512)
    assert len(spec.linears) == 2 * 7 + 1
    q, down = (f"model.layers.1.{p}" for p in ("self_attn.q_proj", "mlp.down_proj"))
    assert (spec.linears[q].out_features, spec.linears[q].in_features) == (128, 64)
    assert spec.linears[q].bias
    assert not spec.linears[down].bias
    assert spec.linears[q].quantized
    assert not spec.linears["lm_head"].quantized
    assert (spec.embeddings["model.embed_tokens"].rows, spec.tied_embeddings) == (320, True)
    assert spec.norms["model.norm"] == 64
    assert spec.norms["model.layers.0.self_attn.q_norm"] == 32


def test_modules_by_path(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    base = load_base(directory, cache_dir=cache)
    path = "model.layers.0.self_attn.q_proj"
    layer = base.linear(path)
    assert layer is base.model.get_submodule(path)
    base.model.set_submodule(path, nn.Identity())  # an engine may wrap it
    assert base.linear(path) is layer
    assert base.embedding("model.embed_tokens") is base.model.get_input_embeddings()
    assert base.norm("model.norm") is base.model.get_submodule("model.norm")
    with pytest.raises(KeyError):
        base.linear("model.layers.9.self_attn.q_proj")


def test_tied_embeddings_are_one_tensor(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    model = load_base(directory, cache_dir=cache).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_no_float_copy_of_a_quantised_weight_is_kept(directory: Path, cache: Path) -> None:
    """None among the tensors that the model can reach, and no mapped file behind them."""
    save_tiny(CONFIGS["llama"], directory)
    base = load_base(directory, double_quant=False, cache_dir=cache)
    paths = quantised(base)
    assert len(paths) == 14
    shapes = {(s.out_features, s.in_features) for s in base.spec.linears.values() if s.quantized}
    kept: dict[int, int] = {}
    for path, module in base.model.named_modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        tensors += [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
        if isinstance(module, NF4Linear):
            tensors += module.weight.tensors().values()
        for tensor in (t for t in tensors if t is not None):
            is_float = tensor.dtype.is_floating_point
            assert not (is_float and tuple(tensor.shape) in shapes), path
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    nf4 = sum(nf4_linear(base, path).weight.nbytes for path in paths)
    weights = sum(out * width for out, width in (nf4_linear(base, p).weight.shape for p in paths))
    assert nf4 == weights // 2 + weights // 64 * 4
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(directory) not in maps.read_text()
    embeddings = 2 * 320 * 64 * 4
    assert sum(kept.values()) < nf4 + embeddings + 4096  # norms and rotary frequencies


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_one_tensor_of_the_checkpoint_is_alive_at_a_time(
    precision: Any, directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds the peak of loading: the base that serves, and one tensor over it."""
    save_tiny(CONFIGS["llama"], directory, dtype=torch.bfloat16)
    read, given, alive = Checkpoint.read, [], []

    def watched(checkpoint: Checkpoint, key: str) -> torch.Tensor:
        alive.append(sum(one() is not None for one in given))
        tensor = read(checkpoint, key)
        given.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    load_base(directory, cache_dir=cache, precision=precision)
    assert len(given) > 20
    assert max(alive) == 0
    assert not any(one() is not None for one in given)


def test_nothing_asks_for_a_gradient(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen2"], directory)
    model = load_base(directory, cache_dir=cache).model
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_checkpoint_in_nf4_already(double_quant: bool, directory: Path, cache: Path) -> None:
    """What transformers and bitsandbytes write loads to the same codes as the float checkpoint."""
    save_tiny(CONFIGS["qwen3"], directory / "float")
    save_quantised(directory, double_quant)
    ours = load_base(directory / "float", double_quant=double_quant, cache_dir=cache)
    theirs = load_base(directory / "nf4", cache_dir=cache)
    assert theirs.spec.double_quant == double_quant
    assert not theirs.spec.twin, "no option changes it"
    asked = load_base(directory / "nf4", double_quant=not double_quant, cache_dir=cache)
    assert asked.spec == theirs.spec
    assert theirs.spec.linears == ours.spec.linears
    for path in quantised(ours):
        a, b = nf4_linear(ours, path).weight, nf4_linear(theirs, path).weight
        assert torch.equal(a.packed, b.packed)
        assert torch.equal(a.dequantize(), b.dequantize())
    with torch.no_grad():
        assert torch.equal(theirs.model(IDS).logits, ours.model(IDS).logits)


def test_other_levels_than_nf4_are_refused(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory / "float")
    save_quantised(directory, double_quant=False)
    key = "model.layers.0.mlp.up_proj.weight.quant_map"
    rewrite(directory / "nf4", lambda t: {**t, key: t[key] * 0.5})
    with pytest.raises(UnservableBase, match=f"{key} does not hold the sixteen levels"):
        load_base(directory / "nf4", cache_dir=cache)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: without(t, "model.layers.1.mlp.up_proj.weight"), r"lacks .*1\.mlp\.up_proj"),
        (lambda t: without(t, "model.layers.0.self_attn.q_proj.bias"), r"lacks .*q_proj\.bias"),
        (lambda t: without(t, "model.embed_tokens.weight"), r"lacks .*model\.embed_tokens\.weight"),
        (
            lambda t: {**t, "model.layers.2.mlp.up_proj.weight": torch.ones(2)},
            r"no place for .*2\.m",
        ),
        (lambda t: {**t, "model.norm.weight": torch.ones(32)}, r"norm\.weight is \[32\].*\[64\]"),
        (
            lambda t: {**t, "model.layers.0.mlp.up_proj.weight": torch.ones(64, 128)},
            r"up_proj\.weight is \[64, 128\] .*\[128, 64\]",
        ),
        (
            lambda t: {**t, "model.norm.weight": torch.ones(64, dtype=torch.int8)},
            r"norm\.weight is torch\.int8",
        ),
        (
            lambda t: {**t, "norm.weight": torch.ones(64)},
            r"model\.norm\.weight and norm\.weight are both|norm\.weight and model\.norm",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: Any, reason: str, directory: Path, cache: Path
) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    rewrite(directory, change)
    with pytest.raises(UnservableBase, match=reason):
        load_base(directory, cache_dir=cache)


def test_a_device_that_is_not_here_is_refused(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    with pytest.raises(UnservableBase, match=r"device cuda:63: torch .* sees \d+ CUDA devices"):
        load_base(directory, device="cuda:63", cache_dir=cache)


def test_logits_that_are_not_finite_are_refused(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["llama"], directory)
    rewrite(directory, lambda t: {**t, "model.norm.weight": torch.full((64,), 1e30)})
    with pytest.raises(UnservableBase, match=r"not finite in torch\.float16"):
        load_base(directory, dtype="float16", cache_dir=cache)


def test_the_tokenizer_and_the_tokens_that_end_an_answer(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    assert load_base(directory, cache_dir=cache).tokenizer is None
    save_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    base = load_base(directory, cache_dir=cache)
    assert base.tokenizer.encode("ab") == [4, 5]
    assert base.eos_token_ids == {2, 7, 3}  # the config's, the generation config's, its own


@pytest.mark.parametrize("dtype", ["int8", torch.float64])
def test_an_unknown_dtype_is_an_error(dtype: Any, directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16, float16; got"):
        load_base(directory, dtype=dtype, cache_dir=cache)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_transformers(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    base = load_base(directory, device="cuda", dtype="float32", cache_dir=cache)
    assert {t.device.type for t in [*base.model.parameters(), *base.model.buffers()]} == {"cuda"}
    assert_equal_to_transformers(base, directory, rtol=1e-4, atol=1e-4)


def assert_equal_to_transformers(
    base: Base, directory: Path, rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    """Logits of the base against from_pretrained with the base's dequantised weights in it."""
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=base.dtype).eval()
    for path in quantised(base):
        layer = oracle.get_submodule(path)
        weight = nf4_linear(base, path).weight.dequantize()
        weight = weight if isinstance(layer, nn.Linear) else weight.T
        error = (weight - layer.weight).norm() / layer.weight.norm()
        assert error < 0.12, path  # NF4 rounds normal weights by 9 %: it is this layer's weight
        layer.weight.data.copy_(weight)
    with torch.no_grad():
        ours = base.model(IDS.to(base.device)).logits.cpu()
        torch.testing.assert_close(ours, oracle(IDS).logits, rtol=rtol, atol=atol)


def quantised(base: Base) -> list[str]:
    return [path for path, shape in base.spec.linears.items() if shape.quantized]


def nf4_linear(base: Base, path: str) -> NF4Linear:
    layer = base.linear(path)
    assert isinstance(layer, NF4Linear)
    return layer


def save_quantised(directory: Path, double_quant: bool) -> None:
    """The road a user takes: load in 4 bit with transformers, save."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory / "float", quantization_config=quantisation, device_map="cpu"
    )
    model.save_pretrained(directory / "nf4")


def rewrite(directory: Path, change: Any) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(tensors: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if k != key}


def test_fast_precision_lays_out_what_it_can(directory: Path, cache: Path) -> None:
    save_tiny(CONFIGS["qwen3"], directory)
    exact = load_base(directory, device="cpu", cache_dir=cache)
    fast = load_base(directory, device="cpu", precision="fast", cache_dir=cache)
    assert exact.precision == "exact"
    assert fast.precision == ("exact" if fast_status().startswith("exact") else "fast")
    assert fast.spec == exact.spec
    for path in quantised(exact):
        assert torch.equal(
            nf4_linear(fast, path).weight.dequantize(), nf4_linear(exact, path).weight.dequantize()
        )
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        wanted, got = (base.model(input_ids=ids).logits for base in (exact, fast))
    assert (got - wanted).norm() <= 0.05 * wanted.norm()


def test_rows_that_no_panel_can_hold_stay_exact(directory: Path, cache: Path) -> None:
    config = LlamaConfig(**{**SIZES, "hidden_size": 72, "head_dim": 18, "intermediate_size": 100})
    save_tiny(config, directory)
    base = load_base(directory, device="cpu", precision="fast", cache_dir=cache)
    assert base.precision == "exact"
    assert_equal_to_transformers(base, directory)
