"""Resized vocabularies, through validation, lowering and a whole model, against PEFT over a model
that was resized alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.delta import PrivateEmbedding, Resized
from adapters.errors import InvalidAdapter
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    VOCABULARY,
    PeftOracle,
    edit_adapter,
    make_adapter,
    random_tokens,
    read_manifest,
    relative_error,
)

Servers = Callable[..., Server]
BOUND = 1e-5
MORE = 5
PROMPT = [*random_tokens(8), VOCABULARY, 7, VOCABULARY + MORE - 1, *random_tokens(3, 1)]
BASES = random_tokens(20)
TABLE, HEAD = "model.embed_tokens", "lm_head"
NAMES = ["embed_tokens", "lm_head"]
NEW = [7, VOCABULARY + 1, VOCABULARY]

# qwen2 and gemma tie the head to the table; gemma multiplies what it looks up.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "the rows as resized": ("llama", {}),
    "the rows as resized, tied": ("gemma", {}),
    "whole tables": ("qwen3", {"modules_to_save": NAMES}),
    "whole tables, tied": ("qwen2", {"modules_to_save": NAMES}),
    "a whole table, the head tied": (
        "gemma",
        {"modules_to_save": NAMES[:1], "ensure_weight_tying": True},
    ),
    "a whole table, the head apart": ("gemma", {"modules_to_save": NAMES[:1]}),
    "trained rows": ("llama", {"trainable_token_indices": NEW}),
    "trained rows, tied": ("qwen2", {"trainable_token_indices": NEW}),
    "trained rows, two lists": (
        "qwen3",
        {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW[1:]}},
    ),
    "LoRA on both": ("qwen3", {"targets": ["q_proj", *NAMES]}),
    "LoRA on a tied table": ("gemma", {"targets": ["q_proj", "embed_tokens"]}),
    "DoRA on both": ("llama", {"kind": "dora", "targets": ["q_proj", *NAMES]}),
    "cut": ("llama", {"new_tokens": -3}),
    "cut, whole tables": ("gemma", {"new_tokens": -3, "modules_to_save": NAMES}),
    "cut, LoRA on both": ("qwen3", {"new_tokens": -3, "targets": ["q_proj", *NAMES]}),
}


def made(path: Path, served: Server, **options: Any) -> Path:
    own = {"kind": "lora", "targets": ["q_proj"], "new_tokens": MORE}
    return make_adapter(path, served.directory, **{**own, **options})


QUICK = ("the rows as resized, tied", "trained rows", "DoRA on both", "cut, LoRA on both")


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_equals_peft_alone_in_a_mixed_batch(case: str, server: Servers, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    padded = {"vocab_size": VOCABULARY + 8} if options.get("new_tokens", MORE) < 0 else {}
    served = server(architecture, **padded)
    adapter = made(tmp_path / "a", served, **options)
    lowered = served.lower(adapter)
    rows = served.base.spec.vocab_size
    count = rows + options.get("new_tokens", MORE)
    assert lowered.vocabulary == count
    prompt = PROMPT if count > rows else [*BASES[:-1], count - 1]
    plain = served.lower(make_adapter(tmp_path / "b", served.directory, "lora", seed=2))
    batch = [(prompt, lowered), (BASES, None), (BASES[:7], plain), (prompt[::-1], lowered)]
    got = served.run(batch)
    for row in (0, 3):
        want = PeftOracle(served.directory, adapter).logits(batch[row][0])
        assert relative_error(got[row][:, :count], want) < BOUND
    alone = served.run([(BASES, None), (BASES[:7], plain)])
    for row in (1, 2):  # the others neither see the new tokens nor change for them
        assert relative_error(got[row][:, :rows], alone[row - 1]) < 1e-6
        assert not got[row][:, rows:].isfinite().any()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("LoRA on both", "float32"),
        pytest.param("LoRA on both", "bfloat16", marks=pytest.mark.slow),
        pytest.param("whole tables, tied", "float32", marks=pytest.mark.slow),
    ],
)
def test_merged_is_what_peft_merges(case: str, dtype: str, server: Servers, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    served = server(architecture)
    adapter = made(tmp_path / "a", served, **options)
    lowered = served.lower(adapter, placement="merged", merged_dtype=dtype)
    (got,) = served.run([(PROMPT, lowered)])
    want = PeftOracle(served.directory, adapter, merged=dtype).logits(PROMPT)
    assert relative_error(got, want) < (BOUND if dtype == "float32" else 1e-2)


def test_rows_that_nobody_trained_share_the_bases_table(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    lowered = served.lower(made(tmp_path / "a", served))
    for path in (TABLE, HEAD):
        delta = lowered.deltas[path]
        assert isinstance(delta, Resized)
        assert not isinstance(delta.inner, PrivateEmbedding)
        assert delta.rows.shape == (MORE, 64)
    assert lowered.nbytes < 3 * MORE * 64 * 4 + 100_000


def test_a_table_alone_is_refused_where_the_head_is_not_tied(
    server: Servers, tmp_path: Path
) -> None:
    served = server("llama")
    adapter = made(tmp_path / "a", served, targets=["q_proj", "embed_tokens"])
    with pytest.raises(InvalidAdapter, match="anew at each start") as caught:
        read_manifest(adapter, served.base.spec)
    assert caught.value.where is not None
    assert "embed_tokens" in caught.value.where


def test_tables_of_two_sizes_are_refused(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = made(tmp_path / "a", served)
    name = f"base_model.model.{HEAD}.weight"
    edit_adapter(adapter, tensors={name: torch.zeros(VOCABULARY + 1, 64)})
    with pytest.raises(InvalidAdapter, match="one vocabulary"):
        read_manifest(adapter, served.base.spec)


def test_saved_twice_must_be_the_same(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = made(tmp_path / "a", served, modules_to_save=NAMES)
    name = f"base_model.model.{HEAD}.modules_to_save.weight"
    edit_adapter(adapter, tensors={name: torch.zeros(VOCABULARY + MORE, 64)})
    with pytest.raises(InvalidAdapter, match="differs") as caught:
        read_manifest(adapter, served.base.spec)
    assert caught.value.where == name


def test_a_base_in_8_bits_is_shared_too(tmp_path: Path, server: Servers) -> None:
    exact = server("gemma")
    fast = Server(exact.directory, precision="fast")
    if fast.base.precision != "fast":
        pytest.skip("this machine has no products in 8 bits")
    adapter = made(tmp_path / "a", exact)
    lowered = fast.lower(adapter)
    assert lowered.nbytes < exact.lower(adapter).nbytes, "its factors are in bfloat16"
    (got,), (want,) = (served.run([(PROMPT, served.lower(adapter))]) for served in (fast, exact))
    assert got.shape == want.shape
    assert relative_error(got, want) < 0.1
