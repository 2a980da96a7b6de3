"""Trained tokens and saved tables, through validation, lowering and a whole model, against PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters.delta import LinearDelta, PrivateRows
from adapters.errors import InvalidAdapter
from adapters.lowering import lower
from adapters.methods import METHODS
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    PeftOracle,
    edit_adapter,
    make_adapter,
    random_tokens,
    read_manifest,
    relative_error,
)

Servers = Callable[..., Server]
BOUND = 1e-5
TABLE, HEAD = "model.embed_tokens", "lm_head"
PROMPT = random_tokens(20)
TOKENS = [PROMPT[3], 500, PROMPT[0], 7]  # not in order, some in the prompt, some not
BOTH = {"embed_tokens": TOKENS, "lm_head": TOKENS[:2]}
ONE = ["q_proj"]

# qwen2 and gemma tie the head to the table; gemma multiplies what it looks up.
CASES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "a table": ("llama", "trainable_tokens", {"targets": ["embed_tokens"]}, {TABLE}),
    "a head": ("llama", "trainable_tokens", {"targets": ["lm_head"]}, {HEAD}),
    "both": ("qwen3", "trainable_tokens", {"targets": [HEAD, "embed_tokens"]}, {TABLE, HEAD}),
    "tied": ("qwen2", "trainable_tokens", {"targets": ["embed_tokens"]}, {TABLE, HEAD}),
    "tied and scaled": ("gemma", "trainable_tokens", {"targets": TABLE}, {TABLE, HEAD}),
    "tied, the head alone": ("qwen2", "trainable_tokens", {"targets": ["lm_head"]}, {HEAD}),
    "beside a LoRA": ("llama", "lora", {"trainable_token_indices": TOKENS}, {TABLE}),
    "beside a LoRA, tied": ("gemma", "lora", {"trainable_token_indices": TOKENS}, {TABLE, HEAD}),
    "beside a DoRA, two lists": ("qwen3", "dora", {"trainable_token_indices": BOTH}, {TABLE, HEAD}),
    "two lists, tied": ("qwen2", "lora", {"trainable_token_indices": BOTH}, {TABLE, HEAD}),
    "one list twice, tied": (
        "qwen2",
        "lora",
        {"trainable_token_indices": dict.fromkeys(BOTH, TOKENS), "ensure_weight_tying": True},
        {TABLE, HEAD},
    ),
    "beside a LoRA on the head": (
        "llama",
        "lora",
        {"trainable_token_indices": TOKENS, "targets": ["lm_head"]},
        {TABLE},
    ),
    "beside a saved head": (
        "llama",
        "lora",
        {"trainable_token_indices": TOKENS, "modules_to_save": ["lm_head"]},
        {TABLE},
    ),
}


def made(path: Path, served: Server, kind: str, **options: Any) -> Path:
    own = {"token_indices": TOKENS} if kind == "trainable_tokens" else {"targets": ONE}
    return make_adapter(path, served.directory, kind, **{**own, **options})


@pytest.mark.parametrize("case", CASES)
def test_equals_peft_alone_in_a_mixed_batch(case: str, server: Servers, tmp_path: Path) -> None:
    architecture, kind, options, paths = CASES[case]
    served = server(architecture)
    adapter = made(tmp_path / "a", served, kind, **options)
    lowered = served.lower(adapter)
    rows = {path for path, delta in lowered.deltas.items() if isinstance(delta, PrivateRows)}
    assert rows == paths
    dora = make_adapter(tmp_path / "dora", served.directory, "dora", seed=2)
    batch = [(PROMPT, lowered), (PROMPT, None), (PROMPT[:7], served.lower(dora)), (PROMPT, lowered)]
    got = served.run(batch)
    directories = [adapter, None, dora, adapter]
    for logits, (tokens, _), directory in zip(got, batch, directories, strict=True):
        want = PeftOracle(served.directory, directory).logits(tokens)
        assert relative_error(logits, want) < BOUND
    assert relative_error(got[0], got[1]) > 1e-2  # the adapter says something


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_is_held(case: str, server: Servers, tmp_path: Path) -> None:
    architecture, kind, options, _ = CASES[case]
    served = server(architecture)
    adapter = made(tmp_path / "a", served, kind, **options)
    assert read_manifest(adapter, served.base.spec).memory_bytes == served.lower(adapter).nbytes


def test_the_registry_says_what_one_target_costs(server: Servers, tmp_path: Path) -> None:
    served = server("qwen2")
    adapter = made(tmp_path / "a", served, "trainable_tokens", targets=["embed_tokens"])
    width = served.base.spec.embeddings[TABLE].width
    cost = eval(METHODS["TRAINABLE_TOKENS"].memory, {"n": width, "token_indices": TOKENS})
    assert served.lower(adapter).nbytes == cost


def test_as_initialised_it_is_the_base(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = made(tmp_path / "a", served, "trainable_tokens", targets=["embed_tokens"], zero=True)
    got = served.run([(PROMPT, served.lower(adapter)), (PROMPT, None)])
    assert relative_error(got[0], got[1]) < 1e-6


def test_merged_placement_keeps_the_rows(server: Servers, tmp_path: Path) -> None:
    """They are private already. PEFT itself cannot merge them where the head is tied."""
    served = server("qwen2")
    adapter = made(tmp_path / "a", served, "lora", trainable_token_indices=TOKENS)
    merged = served.lower(adapter, placement="merged", merged_dtype="float32")
    got = served.run([(PROMPT, merged)])[0]
    want = PeftOracle(served.directory, adapter).logits(PROMPT)
    assert relative_error(got, want) < BOUND
    assert isinstance(merged.deltas[TABLE], PrivateRows)


def test_rows_that_are_tied_must_be_the_same(server: Servers, tmp_path: Path) -> None:
    served = server("qwen2")
    adapter = made(tmp_path / "a", served, "trainable_tokens", targets=["embed_tokens"])
    name = "base_model.model.lm_head.trainable_tokens_delta"
    manifest = read_manifest(adapter, served.base.spec)
    weights = adapter / "adapter_model.safetensors"
    edit_adapter(adapter, tensors={name: None})  # of a tool that saves them once
    assert lower(manifest, weights, served.base).nbytes == manifest.memory_bytes
    edit_adapter(adapter, tensors={name: torch.ones(4, 64)})
    with pytest.raises(InvalidAdapter, match=r"differs from the rows of model\.embed_tokens"):
        lower(manifest, weights, served.base)


# --- save_embedding_layers --------------------------------------------------------------------


def with_tables(
    directory: Path, served: Server, kind: str, change: float, resize: int = 0, **options: Any
) -> Path:
    """An adapter that PEFT saves with the base's tables, changed or not, resized or not."""
    plain = made(directory / "plain", served, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(str(served.directory), dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, str(plain), is_trainable=True)
        if resize:
            adapted.get_base_model().resize_token_embeddings(resize, mean_resizing=False)
        generator = torch.Generator().manual_seed(5)
        weights = {
            id(w): w
            for m in (model.get_input_embeddings(), model.get_output_embeddings())
            if isinstance(w := m.weight, torch.nn.Parameter)
        }
        for weight in weights.values():
            weight.data += change * torch.randn(weight.shape, generator=generator)
        adapted.save_pretrained(str(directory), save_embedding_layers=True)
    return directory


@pytest.mark.parametrize("change", [0.0, 0.05])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma"])
def test_whole_tables_in_the_file(
    architecture: str, change: float, server: Servers, tmp_path: Path
) -> None:
    """PEFT puts them in the place of the base's: both sides, where the two are one matrix."""
    served = server(architecture)
    adapter = with_tables(tmp_path / "a", served, "lora", change)
    assert {f"base_model.model.{p}.weight" for p in (TABLE, HEAD)} <= load_file(
        str(adapter / "adapter_model.safetensors")
    ).keys()
    lowered = served.lower(adapter)
    got = served.run([(PROMPT, lowered), (PROMPT, None)])
    want = PeftOracle(served.directory, adapter).logits(PROMPT)
    assert relative_error(got[0], want) < BOUND
    assert relative_error(got[1], PeftOracle(served.directory).logits(PROMPT)) < BOUND
    assert isinstance(lowered.deltas[HEAD], LinearDelta) == (change == 0)
    table = served.base.embedding(TABLE).weight
    assert (lowered.nbytes < table.numel() * 4) == (change == 0)  # the base's own costs nothing


@pytest.mark.parametrize("kind", ["ia3", "miss"])
def test_whole_tables_beside_any_method(kind: str, server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = with_tables(tmp_path / "a", served, kind, 0.05)
    got = served.run([(PROMPT, served.lower(adapter))])[0]
    assert relative_error(got, PeftOracle(served.directory, adapter).logits(PROMPT)) < BOUND


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("rows", "reason"),
    [(515, "resized from 512 to 515 rows.* send the tokenizer"), (500, "cut to 500 rows")],
)
def test_a_resized_vocabulary_needs_a_tokenizer_that_fits(
    architecture: str, rows: int, reason: str, server: Servers, tmp_path: Path
) -> None:
    served = server(architecture)
    adapter = with_tables(tmp_path / "a", served, "lora", 0.0, resize=rows)
    with pytest.raises(InvalidAdapter, match=reason) as caught:
        read_manifest(adapter, served.base.spec)
    assert caught.value.where == "tokenizer"


def test_tied_tables_must_be_one(server: Servers, tmp_path: Path) -> None:
    served = server("qwen2")
    adapter = with_tables(tmp_path / "a", served, "lora", 0.05)
    name = f"base_model.model.{HEAD}.weight"
    head = load_file(str(adapter / "adapter_model.safetensors"))[name]
    edit_adapter(adapter, tensors={name: head + 1})
    with pytest.raises(InvalidAdapter, match=f"differs from {TABLE}") as caught:
        read_manifest(adapter, served.base.spec)
    assert caught.value.where == name
    edit_adapter(adapter, tensors={name: None})
    with pytest.raises(InvalidAdapter, match="is missing") as caught:
        read_manifest(adapter, served.base.spec)
    assert caught.value.where == name


def test_what_peft_itself_cannot_run(server: Servers, tmp_path: Path) -> None:
    """The reasons that our refusals name: if PEFT learns to run these, they should be served."""
    from peft import LoraConfig, TrainableTokensConfig

    served = server("qwen2")
    for config in (
        TrainableTokensConfig(token_indices=[7], target_modules=["embed_tokens", "lm_head"]),
        LoraConfig(trainable_token_indices=[7], modules_to_save=["lm_head"], target_modules=ONE),
    ):
        model = AutoModelForCausalLM.from_pretrained(str(served.directory))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config)
        with pytest.raises(ValueError, match="unknown layer type"):
            adapted(input_ids=torch.tensor([PROMPT]))
