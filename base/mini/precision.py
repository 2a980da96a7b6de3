"""What rounding products, or the KV cache, changes on the embedded base: perplexity, answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface

from base.dense import RoundedEmbedding
from base.kernels import Precision, pack, unpack
from base.load import Base, load_base
from base.mini import DOUBLE_QUANT, held_out
from base.mini.evaluate import SEED, Size, Table, measure
from base.mini.packing import encode
from base.nf4 import NF4Linear

BOUND = 0.005  # what may move for `fast` to be the default: perplexity and shares of answers


def _base(directory: Path, precision: Precision = "exact") -> Base:
    """As `mini` is quantised where it ships: a copy that is being built is no other base."""
    return load_base(
        directory, device="cpu", dtype="float32", double_quant=DOUBLE_QUANT, precision=precision
    )


@dataclass(frozen=True)
class Movement:
    """Both precisions on the same held-out items."""

    exact: Table
    fast: Table
    layers: dict[str, float]  # |y_fast - y_exact| / |y_exact| for the same x, by kind of layer

    def of(self, group: str, row: str) -> float:
        """How far one figure moved: of a loss the change of its perplexity, by its share."""
        before, after = self.exact[group][row], self.fast[group][row]
        return math.exp(after - before) - 1 if group == "loss" else after - before

    @property
    def summary(self) -> dict[str, float]:
        """The figures that decide: over all texts, all tasks, all answers from context."""
        losses = [self.of("loss", row) for row in self.exact["loss"]]
        return {
            "perplexity": sum(losses) / len(losses),
            "tasks": self.of("tasks", "all"),
            "context": self.of("context", "all"),
        }

    @property
    def within_bound(self) -> bool:
        return all(abs(value) < BOUND for value in self.summary.values())


@torch.inference_mode()
def compare_kv(directory: Path, dtype: torch.dtype, size: Size | None = None) -> Movement:
    """Measure the base in `directory` in `exact`, and again with keys and values kept in `dtype`.

    `layers` has what is lost of keys and values, and of the logits, over some questions.
    """
    size = size or Size()
    tok = Tokenizer.from_file(str(directory / "tokenizer.json"))
    net = _base(directory).model
    before, kept = measure(net, tok, size), _Kept(dtype)
    documents = [item.document for item in held_out.context_items(SEED, 2)]
    asked = [torch.tensor([ids]) for ids, _ in encode(tok, documents)]
    right = [net(input_ids=ids, use_cache=False).logits for ids in asked]
    AttentionInterface.register(kept.name, kept)
    net.set_attn_implementation(kept.name)
    after = measure(net, tok, size)
    for ids, logits in zip(asked, right, strict=True):
        kept.errors.add("logits", net(input_ids=ids, use_cache=False).logits, logits)
    return Movement(before, after, kept.errors.found)


class _Kept:
    """An attention that sees keys and values as a cache of `dtype` gives them back."""

    name = "nibble_kept"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.errors = _Errors()

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        rounded = []
        for name, x in (("keys", k), ("values", v)):
            rounded.append(unpack(pack(x, self.dtype), x.shape[-1]))
            self.errors.add(name, rounded[-1], x)
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in rounded)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=more.get("scaling")
        )
        return out.transpose(1, 2).contiguous(), None


class _Errors:
    """|y - wanted| / |wanted|, pooled by name."""

    def __init__(self) -> None:
        self._wrong: dict[str, float] = {}
        self._whole: dict[str, float] = {}

    def add(self, name: str, y: Tensor, wanted: Tensor) -> None:
        self._wrong[name] = self._wrong.get(name, 0.0) + float((y - wanted).square().sum())
        self._whole[name] = self._whole.get(name, 0.0) + float(wanted.square().sum())

    @property
    def found(self) -> dict[str, float]:
        return {name: math.sqrt(w / self._whole[name]) for name, w in sorted(self._wrong.items())}


def compare(directory: Path, size: Size | None = None) -> Movement:
    """Measure the base in `directory` in both precisions, on the CPU. Needs the C library."""
    size = size or Size()
    tok = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast = _base(directory, "fast")
    if fast.precision != "fast":
        raise RuntimeError("the fast precision needs the C library: python -m base.kernels.build")
    exact = _base(directory)
    return Movement(
        measure(exact.model, tok, size),
        measure(fast.model, tok, size),
        layer_errors(exact, fast, tok),
    )


@torch.inference_mode()
def layer_errors(exact: Base, fast: Base, tok: Tokenizer, items: int = 12) -> dict[str, float]:
    """The error of each kind of layer (q_proj, down_proj, lm_head, embed_tokens, ...) over some
    questions, pooled: what `fast` makes of the same input, beside what `exact` makes of it."""
    errors = _Errors()

    def watch(
        name: str, right: nn.Module
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, y: Tensor) -> None:
            del layer
            errors.add(name, y, right(inputs[0]))

        return hook

    handles = [
        module.register_forward_hook(
            watch(path.rpartition(".")[2], exact.model.get_submodule(path))
        )
        for path, module in fast.model.named_modules()
        if isinstance(module, NF4Linear | RoundedEmbedding)
    ]
    documents = [item.document for item in held_out.context_items(SEED, items // 6)]
    for ids, _ in encode(tok, documents):
        fast.model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return errors.found
