"""The base without transformers: the same bits, the same paths, and nothing of it imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from base import attention_functions, kernels
from base.fused import fuse
from base.kept_tokenizer import KeptTokenizer
from base.lean.model import LeanModel
from base.lean.outline import outline_of
from base.load import Base, load_base
from base.mini import MINI
from tests.base.fused.test_decoder import KNOWN, run
from tests.base.tiny import CONFIGS, save_tiny, save_tokenizer
from tests.oracle import make_base

pytestmark = pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")

TEXTS = ("", "Hello, world.", "<|im_start|>user\nHi<|im_end|>", "안녕 — ünï\t\n  code ☃ 12345")


def load(source: Path, cache: Path, **more: Any) -> Base:
    return load_base(source, device="cpu", dtype="float32", cache_dir=cache, **more)


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "exact") for name in KNOWN), ("mistral", "fast"), ("gemma2", "fast")],
)
def test_a_lean_base_gives_the_bits_of_transformers(
    name: str, precision: Any, tmp_path: Path
) -> None:
    tied = name.startswith("gemma") or name == "qwen2"
    source = make_base(tmp_path / name, name, tied=tied, **KNOWN[name])
    theirs = load(source, tmp_path / "cache", precision=precision)
    ours = load(source, tmp_path / "cache", precision=precision, lean=True)
    assert not isinstance(theirs.model, LeanModel)
    assert isinstance(ours.model, LeanModel)
    assert ours.spec == theirs.spec
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.precision == theirs.precision
    decoder = fuse(theirs.model)
    wanted = run(theirs.model, decoder)
    lean = fuse(ours.model)
    assert lean is not None
    assert torch.equal(run(ours.model, lean), wanted)
    paths = {path for path, _ in ours.model.named_modules()}
    assert paths == {path for path, _ in theirs.model.named_modules()} - {
        f"model.layers.{i}.mlp.act_fn" for i in range(2)
    }


def test_llama3_scales_its_frequencies(tmp_path: Path) -> None:
    save_tiny(CONFIGS["llama-rope3"], tmp_path / "b")
    theirs = load(tmp_path / "b", tmp_path / "cache")
    ours = load(tmp_path / "b", tmp_path / "cache", lean=True)
    assert isinstance(ours.model, LeanModel)
    positions = torch.arange(300)[None]
    wanted = theirs.model.model.rotary_emb(torch.empty(0), positions)
    assert all(map(torch.equal, ours.model.model.rotary_emb(torch.empty(0), positions), wanted))


def test_only_what_has_passed_the_trial_run_comes_lean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(CONFIGS["qwen3"], tmp_path / "b")
    source, cache = tmp_path / "b", tmp_path / "cache"
    assert not isinstance(load(source, cache, lean=True).model, LeanModel)
    assert isinstance(load(source, cache, lean=True).model, LeanModel)
    assert not isinstance(load(source, cache).model, LeanModel)
    assert not isinstance(load(source, cache, lean=True, keep=False).model, LeanModel)
    assert not isinstance(load(source, cache, lean=True, always_probe=True).model, LeanModel)
    with monkeypatch.context() as without:
        without.setattr("base.kept.code_version", lambda: "another version")
        assert not isinstance(load(source, cache, lean=True).model, LeanModel)
    load(source, cache)
    monkeypatch.setattr(kernels, "_native", None)
    assert not isinstance(load(source, cache, lean=True).model, LeanModel)


def test_a_damaged_outline_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(CONFIGS["qwen3"], tmp_path / "b")
    good = outline_of(load(tmp_path / "b", tmp_path / "cache").model, {})
    assert good is None  # filled: its layers are no linear layers any more

    def narrower(model: Any, config_json: Any) -> Any:
        found = dict(outline_of(model, config_json) or {})
        linears = {**found["linears"], "model.layers.0.mlp.up_proj": [64, 64, False]}
        return {**found, "linears": linears}

    monkeypatch.setattr("base.load.outline_of", narrower)
    load(tmp_path / "b", tmp_path / "other")
    assert not isinstance(load(tmp_path / "b", tmp_path / "other", lean=True).model, LeanModel)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "phi3"},
        {
            "model_type": "llama",
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 1.0,
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 512,
            },
        },
    ],
)
def test_what_is_not_known_has_no_outline(config: dict[str, Any]) -> None:
    from base.architecture import empty_model
    from tests.base.tiny import SIZES

    model = empty_model({**SIZES, **config}, torch.float32)
    assert outline_of(model, config) is None


def test_another_dtype_has_no_outline() -> None:
    from base.architecture import empty_model
    from tests.base.tiny import SIZES

    config = {**SIZES, "model_type": "llama"}
    assert outline_of(empty_model(config, torch.float32), config) is not None
    assert outline_of(empty_model(config, torch.bfloat16), config) is None


def test_the_kept_tokenizer_is_transformers(tmp_path: Path) -> None:
    theirs = load(MINI, tmp_path).tokenizer
    first = load(MINI, tmp_path, lean=True).tokenizer
    ours = load(MINI, tmp_path, lean=True).tokenizer
    assert isinstance(first, KeptTokenizer)
    assert not isinstance(theirs, KeptTokenizer)
    assert isinstance(ours, KeptTokenizer)
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(
                text, add_special_tokens=special
            )
        found = ours(text, add_special_tokens=False, return_offsets_mapping=True)
        wanted = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found["input_ids"] == wanted["input_ids"]
        assert found["offset_mapping"] == wanted["offset_mapping"]
        ids = found["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    for name in (
        "chat_template",
        "special_tokens_map",
        "all_special_ids",
        "clean_up_tokenization_spaces",
        "model_max_length",
        *(f"{role}_token_id" for role in ("bos", "eos", "unk", "pad")),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    added = ours.added_tokens_decoder
    assert {i: (t.content, t.special) for i, t in added.items()} == {
        i: (t.content, t.special) for i, t in theirs.added_tokens_decoder.items()
    }


def test_another_tokenizer_is_another_file(tmp_path: Path) -> None:
    save_tiny(CONFIGS["qwen3"], tmp_path / "b")
    save_tokenizer(tmp_path / "b")
    cache = tmp_path / "cache"
    wanted = load(tmp_path / "b", cache, lean=True).tokenizer.model_max_length
    (file,) = (cache / "tokenizers").iterdir()
    good = file.read_bytes()
    for bad in (b"", good[:-9], good.replace(b'"model_max_length": ', b'"model_max_length": 1', 1)):
        file.write_bytes(bad)
        assert bad != good
        found = load(tmp_path / "b", cache, lean=True).tokenizer
        assert found.model_max_length == wanted  # made anew, and kept again
        assert file.read_bytes() == good
    config = tmp_path / "b" / "tokenizer_config.json"
    changed = {**json.loads(config.read_text()), "chat_template": "{{ messages }}"}
    config.write_text(json.dumps(changed))
    found = load(tmp_path / "b", cache, lean=True).tokenizer
    assert found.chat_template == "{{ messages }}"


def test_a_function_is_found_in_both_registries() -> None:
    def attend(*_: Any, **__: Any) -> Any:
        return None, None

    attention_functions.register("nibble_lean_test", attend)
    assert attention_functions.find("nibble_lean_test") is attend
    assert callable(attention_functions.find("sdpa"))
    with pytest.raises(KeyError):
        attention_functions.find("nobody_has_this")
