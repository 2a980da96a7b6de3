"""A trial run of a loaded model: does a mixed batch give what each sequence gives by itself?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UnservableBase
from base.kernels import PanelWeight, paged_attention

_NAME = "nibble_probe"
_LENGTHS = (5, 3)  # two sequences, laid end to end ...
_STEPS = ((4, 2), (1, 1))  # ... whose tokens arrive in two steps, so many of each in each step
# What an attention function may be asked for beyond q, k, v, and is not served.
_UNSERVED = {"s_aux": "attention sinks", "position_bias": "a position bias", "alibi": "ALiBi"}
# Largest difference of logits that is rounding, as a part of the largest logit.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_ROUNDING_IN_8_BITS = 0.1  # a last bit of the attention may tip an activation to another of 255


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The shape that every layer's attention has."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def describe(self) -> str:
        return f"{self.num_heads} heads of width {self.head_dim} over {self.num_kv_heads}"


def probe_attention(model: Any, device: torch.device) -> AttentionShape:
    """Run two short sequences as one batch over paged keys and values, then each by itself.

    The batch is what the engine will ask for: tokens end to end with position ids, prefill and
    then a step of one token each, an attention function of ours, chosen rows of logits. A model
    that cannot do that, or gives other logits than by itself, raises UnservableBase: there are
    models that ignore position ids, or bring a mask, a bias or a state of their own.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 1 + sum(_LENGTHS), device=device) * 7919 % vocabulary
    sequences = torch.split(ids, list(_LENGTHS))
    trial = _Trial()
    try:
        with torch.inference_mode():
            together = trial.run(model, sequences)
            alone = torch.cat([_alone(model, sequence) for sequence in sequences])
    except UnservableBase:
        raise
    except Exception as error:  # whatever a model raises when it is called as the engine does
        raise UnservableBase(f"a trial run of {type(model).__name__} fails: {error}") from error
    shape = _agreed(trial.layers, model.config.num_hidden_layers)
    _compare(together, alone, _rounding(model, alone.dtype))
    return shape


def _alone(model: Any, ids: Tensor) -> Tensor:
    """The logits [T, vocabulary] of one sequence, all left to transformers."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


class _Trial:
    """The batch of `_STEPS` over a cache with pages of one token."""

    def __init__(self) -> None:
        self.layers: list[tuple[int, AttentionShape]] = []  # of the step that runs now
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> k, v [pages, 1, heads, width]
        self._tables: list[list[int]] = [[] for _ in _LENGTHS]  # the pages of each sequence
        self._counts: tuple[int, ...] = ()

    def run(self, model: Any, sequences: tuple[Tensor, ...]) -> Tensor:
        """The logits [T, vocabulary], sequence after sequence."""
        rows: list[list[Tensor]] = [[] for _ in sequences]
        with _attention(model, self._attend):
            for self._counts in _STEPS:
                logits = self._step(model, sequences)
                for mine, part in zip(rows, torch.split(logits, list(self._counts)), strict=True):
                    mine.append(part)
        return torch.cat([part for mine in rows for part in mine])

    def _step(self, model: Any, sequences: tuple[Tensor, ...]) -> Tensor:
        self.layers.clear()
        ids, positions = [], []
        page = sum(len(table) for table in self._tables)
        for table, sequence, count in zip(self._tables, sequences, self._counts, strict=True):
            start = len(table)
            ids.append(sequence[start : start + count])
            positions.append(torch.arange(start, start + count, device=sequence.device))
            table.extend(range(page, page + count))
            page += count
        logits: Tensor = model(
            input_ids=torch.cat(ids)[None],
            position_ids=torch.cat(positions)[None],
            use_cache=False,
            logits_to_keep=torch.arange(sum(self._counts), device=sequences[0].device),
        ).logits[0]
        return logits

    def _attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        """transformers' interface: q, k, v [1, heads, T, width] -> [1, T, heads, width]."""
        layer = int(getattr(module, "layer_idx", -1))
        _refuse(module, f"the attention of layer {layer}", (q, k, v), mask, more)
        self.layers.append((layer, AttentionShape(0, q.shape[1], k.shape[1], q.shape[3])))
        keys, values = (t[0].transpose(0, 1).unsqueeze(1) for t in (k, v))
        if layer in self._cache:
            earlier = self._cache[layer]
            keys, values = torch.cat((earlier[0], keys)), torch.cat((earlier[1], values))
        self._cache[layer] = (keys, values)
        width = max(map(len, self._tables))
        scaling = more.get("scaling")
        out = paged_attention(
            q[0].transpose(0, 1).contiguous(),
            keys.contiguous(),
            values.contiguous(),
            _ints([table + [0] * (width - len(table)) for table in self._tables]),
            _ints([0, *itertools.accumulate(self._counts)]),
            _ints([len(table) for table in self._tables]),
            q.shape[-1] ** -0.5 if scaling is None else float(scaling),
            more.get("sliding_window") or 0,
            more.get("softcap") or 0.0,
        )
        return out.unsqueeze(0), None


def _ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@contextmanager
def _attention(model: Any, attend: Any) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def _refuse(
    module: nn.Module, where: str, qkv: tuple[Tensor, ...], mask: Any, more: dict[str, Any]
) -> None:
    q, k, v = qkv
    if not getattr(module, "is_causal", True) or more.get("is_causal") is False:
        raise UnservableBase(f"{where} is not causal")
    if mask is not None:
        raise UnservableBase(f"{where} brings a mask of its own")
    for name, what in _UNSERVED.items():
        if more.get(name) is not None:
            raise UnservableBase(f"{where} needs {what}, which is not served")
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        raise UnservableBase(
            f"{where} has queries, keys and values of {q.shape[-1]}, {k.shape[-1]} and "
            f"{v.shape[-1]} per head; one width is served"
        )
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise UnservableBase(f"{where} sees queries {list(q.shape)} and keys {list(k.shape)}")


def _agreed(layers: list[tuple[int, AttentionShape]], num_layers: int) -> AttentionShape:
    numbers = [layer for layer, _ in layers]
    if numbers != list(range(num_layers)):
        raise UnservableBase(
            f"the layers that attend through transformers' attention interface are {numbers}, "
            f"expected each of {num_layers} once, in order"
        )
    shape = layers[0][1]
    for layer, other in layers:
        if other != shape:
            raise UnservableBase(
                f"layer {layer} attends with {other.describe()}, layer 0 with {shape.describe()}; "
                "one shape is served"
            )
    return AttentionShape(num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim)


def _rounding(model: Any, dtype: torch.dtype) -> float:
    eight = any(isinstance(getattr(m, "weight", None), PanelWeight) for m in model.modules())
    return _ROUNDING_IN_8_BITS if eight else _ROUNDING[dtype]


def _compare(together: Tensor, alone: Tensor, rounding: float) -> None:
    if not together.isfinite().all():
        raise UnservableBase(
            f"the base gives logits that are not finite in {alone.dtype}; try float32 or bfloat16"
        )
    largest = alone.abs().max().clamp(min=1e-6)
    difference = float((together - alone).abs().max() / largest)
    if not difference <= rounding:
        raise UnservableBase(
            f"logits of a mixed batch differ from those of one sequence by {difference:.1e} of the "
            "largest: the model does not follow position ids, or its sequences mix"
        )
