"""Half a decoder layer in one call of the C library, and the adapters' part in it as tables."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .lowrank import LowRank
from .panels import PanelWeight
from .weight import NF4Weight

_I64 = ctypes.c_int64
_PTR = ctypes.c_void_p
_FLOAT = ctypes.c_float


class Linear(IntEnum):
    """The linears of a layer, in the order of csrc/decoder.h."""

    Q, K, V, O, GATE, UP, DOWN = range(7)  # noqa: E741


class Norm(IntEnum):
    """The norms of a layer, in the order of csrc/decoder.h."""

    INPUT, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP, Q, K = range(6)


STORED = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # how a cache keeps its vectors
PLACES = len(Linear) + len(Norm)  # of one layer


class _Place(ctypes.Structure):
    """`adapter_place`."""

    _fields_ = [("terms", _PTR), ("count", _I64), ("norm", _PTR)]


class _Span(ctypes.Structure):
    """`adapter_span`."""

    _fields_ = [("start", _I64), ("stop", _I64), ("table", _PTR)]


class _Linear(ctypes.Structure):
    """`decoder_linear`."""

    _fields_ = [
        *((name, _PTR) for name in ("exact", "panels", "bias")),
        *((name, _I64) for name in ("out", "in", "bits")),
    ]


class _Layer(ctypes.Structure):
    """`decoder_layer`."""

    _fields_ = [
        ("linear", _Linear * len(Linear)),
        ("norm", _PTR * len(Norm)),
        *((name, _I64) for name in ("first_place", "hidden", "heads", "kv_heads", "dim")),
        *((name, _I64) for name in ("inner", "gate", "index", "window")),
        *((name, _FLOAT) for name in ("eps", "shift", "scale", "softcap")),
    ]


class _Step(ctypes.Structure):
    """`decoder_step`."""

    _fields_ = [
        *((name, _I64) for name in ("tokens", "spans")),
        *((name, _PTR) for name in ("span", "cos", "sin", "normed", "out", "gate", "up")),
    ]


class _Pages(ctypes.Structure):
    """`decoder_pages`."""

    _fields_ = [
        *((name, _PTR) for name in ("keys", "values", "slots", "tables", "query_start")),
        ("context_len", _PTR),
        *((name, _I64) for name in ("sequences", "table_width", "block_size", "blocks", "stored")),
    ]


class AdapterTable:
    """What one adapter has at each place of the decoder: made once, used by every step."""

    def __init__(self, places: int) -> None:
        self._places = (_Place * places)()
        self._kept: list[Any] = []  # what the addresses point to

    @property
    def address(self) -> int:
        return ctypes.addressof(self._places)

    def put_terms(self, place: int, terms: Sequence[LowRank]) -> None:
        """The terms of a linear; they run in order."""
        records = b"".join(bytes(16) + term.record for term in terms)
        self._kept += [records, *terms]
        self._places[place].terms = ctypes.cast(ctypes.c_char_p(records), _PTR)
        self._places[place].count = len(terms)

    def put_norm(self, place: int, weight: Tensor) -> None:
        weight = weight.detach().float().contiguous()
        self._kept.append(weight)
        self._places[place].norm = weight.data_ptr()


class Spans:
    """Whose the tokens of a step are: (start, stop, table) in order; the rest is the base's."""

    def __init__(self, spans: Sequence[tuple[int, int, AdapterTable]] = ()) -> None:
        self._tables = [table for _, _, table in spans]
        self.records = (_Span * len(spans))(*(_Span(a, b, t.address) for a, b, t in spans))
        self.tokens = max((stop for _, stop, _ in spans), default=0)


class LayerRecord:
    """One decoder layer for the C library. It holds addresses of the tensors that it keeps."""

    def __init__(
        self,
        linears: Mapping[Linear, tuple[NF4Weight | PanelWeight, Tensor | None]],
        norms: Mapping[Norm, Tensor],
        *,
        first_place: int,
        heads: int,
        kv_heads: int,
        dim: int,
        gate: int,
        eps: float,
        shift: float,
        index: int = 0,
        window: int = 0,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        """`index` to `softcap` say what its attention over pages does (`run`)."""
        self._kept = (dict(linears), dict(norms))
        self.inner, self.hidden = linears[Linear.GATE][0].shape
        self.layer = _Layer(
            first_place=first_place,
            hidden=self.hidden,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            inner=self.inner,
            gate=gate,
            eps=eps,
            shift=shift,
            index=index,
            window=window,
            scale=scale,
            softcap=softcap,
        )
        for place, (weight, bias) in linears.items():
            record = weight.record if isinstance(weight, NF4Weight) else None
            panels = weight.panels if isinstance(weight, PanelWeight) else None
            self.layer.linear[place] = _Linear(
                None if record is None else ctypes.cast(ctypes.c_char_p(record), _PTR),
                None if panels is None else panels.data_ptr(),
                None if bias is None else bias.data_ptr(),
                *weight.shape,
                weight.bits if isinstance(weight, PanelWeight) else 4,
            )
        for which, own in norms.items():
            self.layer.norm[which] = own.data_ptr()


class StepRecord:
    """One step's tokens, adapters and angles, and room for what a layer computes on its way."""

    def __init__(
        self, cos: Tensor, sin: Tensor, spans: Spans, hidden: int, inner: int, room: Room
    ) -> None:
        self.tokens = cos.numel() // cos.shape[-1]
        assert spans.tokens <= self.tokens, f"spans of {spans.tokens} in {self.tokens} tokens"
        self._kept = (cos, sin, spans)
        rows = room.of(self.tokens * 2 * (hidden + inner))
        at = [0, hidden, 2 * hidden, 2 * hidden + inner]
        normed, out, gate, up = (rows.data_ptr() + 4 * self.tokens * i for i in at)
        self.step = _Step(
            self.tokens,
            len(spans.records),
            ctypes.addressof(spans.records),
            cos.data_ptr(),
            sin.data_ptr(),
            *(normed, out, gate, up),
        )


class CachePages:
    """The pages of all layers of a KV cache, [blocks, block_size, kv_heads, width] each."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for tensor in (*keys, *values):
            fits = tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in STORED
            if not fits or tensor.dtype != keys[0].dtype or tensor.shape[:2] != keys[0].shape[:2]:
                raise ValueError("the caches of all layers must be alike, on the CPU, contiguous")
        self._kept = (tuple(keys), tuple(values))
        self.keys, self.values = (
            (_PTR * len(kept))(*(tensor.data_ptr() for tensor in kept)) for kept in self._kept
        )
        self.blocks, self.block_size = keys[0].shape[:2]
        self.stored = STORED[keys[0].dtype]


class StepPages:
    """Where the keys and values of one step's sequences are; `base.kernels.paged_attention` says
    what the tensors are. `layers` receives the numbers of the layers that went through them."""

    def __init__(
        self,
        cache: CachePages,
        slots: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        layers: set[int],
    ) -> None:
        kept = (slots, block_tables, query_start, context_len)
        for tensor, dtype in zip(kept, (torch.int64, *(torch.int32,) * 3), strict=True):
            if not tensor.is_cpu or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(f"an index must be {dtype} on the CPU and contiguous")
        self._kept = (cache, *kept)
        self.layers = layers
        self.tokens = len(slots)
        self.record = _Pages(
            ctypes.addressof(cache.keys),
            ctypes.addressof(cache.values),
            *(tensor.data_ptr() for tensor in kept),
            *block_tables.shape,
            *(cache.block_size, cache.blocks, cache.stored),
        )


class Room:
    """Floats that are used again by every layer of every step; grown, never shrunk."""

    def __init__(self) -> None:
        self._floats = torch.empty(0)

    def of(self, count: int) -> Tensor:
        if self._floats.numel() < count:
            self._floats = torch.empty(count)
        return self._floats


class DecoderHalves:
    """The calls of csrc/decoder.c; tensors are contiguous float32 on the CPU."""

    def __init__(self, library: Any) -> None:
        self._open = library.nibble_decoder_open
        self._open.argtypes = [
            *(ctypes.POINTER(_Layer), ctypes.POINTER(_Step)),
            *(_PTR, _PTR, _PTR, _PTR, ctypes.c_int),
        ]
        self._close = library.nibble_decoder_close
        self._close.argtypes = [
            *(ctypes.POINTER(_Layer), ctypes.POINTER(_Step)),
            *(_PTR, _PTR, _PTR, ctypes.c_int),
        ]
        self._run = library.nibble_decoder_run
        self._run.argtypes = [
            *(_PTR, _PTR, _I64, ctypes.POINTER(_Pages)),
            *(_PTR, _PTR, _PTR, ctypes.c_int),
        ]
        self._room = Room()

    def run(
        self,
        layers: Sequence[LayerRecord],
        steps: Sequence[StepRecord],
        pages: StepPages,
        h: Tensor,
    ) -> Tensor:
        """Whole layers one after the other, steps[i] being layer i's: h [.., T, hidden] -> as h."""
        tokens, records = pages.tokens, [layer.layer for layer in layers]
        assert all(step.tokens == tokens for step in steps)
        each = max((2 * r.heads + 2 * r.kv_heads) * r.dim + r.hidden for r in records)
        to, own = torch.empty_like(h), self._room.of(tokens * each)
        failed = self._run(
            (_PTR * len(records))(*map(ctypes.addressof, records)),
            (_PTR * len(records))(*(ctypes.addressof(step.step) for step in steps)),
            *(len(records), pages.record, h.data_ptr(), to.data_ptr(), own.data_ptr()),
            torch.get_num_threads(),
        )
        check(failed)
        pages.layers.update(record.index for record in records)
        return to

    def open(
        self, layer: LayerRecord, step: StepRecord, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [.., T, hidden] -> q [T, heads, dim], k and v [T, kv_heads, dim], rotated."""
        record = layer.layer
        q = torch.empty(step.tokens, record.heads, record.dim)
        k = torch.empty(step.tokens, record.kv_heads, record.dim)
        v = torch.empty(step.tokens, record.kv_heads, record.dim)
        threads = torch.get_num_threads()
        failed = self._open(
            *(record, step.step, h.data_ptr()),
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), threads),
        )
        check(failed)
        return q, k, v

    def close(self, layer: LayerRecord, step: StepRecord, h: Tensor, attended: Tensor) -> Tensor:
        """The stream h and what attention gave, [.., T, heads, dim] -> the next stream, as h."""
        to = torch.empty_like(h)
        failed = self._close(
            *(layer.layer, step.step, h.data_ptr(), attended.data_ptr(), to.data_ptr()),
            torch.get_num_threads(),
        )
        check(failed)
        return to


def check(failed: int) -> None:
    """Raise what a call's answer means; 0 is none."""
    if failed == 2:
        raise ValueError(
            "query_start, context_len or block_tables point outside q or the caches: a sequence "
            "needs 0 <= its rows <= context_len <= pages * block_size, and pages that exist"
        )
    if failed:
        raise MemoryError("no memory for the workspace of a kernel")
