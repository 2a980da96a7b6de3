"""The C library of csrc/, through ctypes. Built by build.py; the torch path serves without it."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .decoder import STORED, DecoderHalves, check
from .lowrank import LowRankPlan
from .panels import PanelWeight
from .steps import Steps
from .weight import NF4Weight

# As in build.py, which must run as a script and without torch.
LIBRARY = "_native.so"
REASON = "_native.txt"

_I64 = ctypes.c_int64
_PTR = ctypes.c_void_p
_PRODUCT = struct.Struct("=QQQqqQq")  # `fast_product` of csrc/kernels.h
Weight = NF4Weight | PanelWeight
_NO_TERMS = LowRankPlan([])


class _AttentionCall(ctypes.Structure):
    """`attention_call` of csrc/kernels.h."""

    _fields_ = [
        *((name, _PTR) for name in ("q", "k", "v", "tables", "query_start", "context_len", "out")),
        *((name, _I64) for name in ("sequences", "table_width", "heads", "kv_heads", "dim")),
        *((name, _I64) for name in ("block_size", "window", "stored")),
        *((name, _I64) for name in ("tokens", "blocks")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class _CacheCall(ctypes.Structure):
    """`cache_call` of csrc/kernels.h."""

    _fields_ = [
        *((name, _PTR) for name in ("x", "cache", "slots")),
        *((name, _I64) for name in ("rows", "heads", "dim", "stored", "places")),
    ]


class Native:
    """The loaded library. Callers have checked devices, dtypes, shapes and contiguity."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._select = library.nibble_select
        self._select.argtypes, self._select.restype = [ctypes.c_char_p], ctypes.c_char_p
        self._nf4_linear = library.nibble_nf4_linear
        self._nf4_linear.argtypes = [ctypes.c_char_p, _PTR, _I64, _PTR, _PTR, ctypes.c_int]
        self._lowrank_add = library.nibble_lowrank_add
        self._lowrank_add.argtypes = [
            *(ctypes.c_char_p, _I64, _PTR, _I64),
            *(_PTR, _I64, _I64, ctypes.c_int),
        ]
        self._attention = library.nibble_attention
        self._attention.argtypes = [ctypes.POINTER(_AttentionCall), ctypes.c_int]
        self._cache_write = library.nibble_cache_write
        self._cache_write.argtypes = [ctypes.POINTER(_CacheCall), ctypes.c_int]
        self._fast_name = library.nibble_fast_name
        self._fast_name.restype = ctypes.c_char_p
        self._fast_levels = library.nibble_fast_levels
        self._fast_levels.argtypes, self._fast_levels.restype = [_PTR], ctypes.c_float
        self._fast_bytes = library.nibble_fast_bytes
        self._fast_bytes.argtypes, self._fast_bytes.restype = [_PTR], None
        self._fast_linear = library.nibble_fast_linear
        self._fast_linear.argtypes = [ctypes.c_char_p, _I64, _PTR, _I64, _I64, ctypes.c_int]
        self._nf4_rows = library.nibble_nf4_rows
        self._nf4_rows.argtypes = [ctypes.c_char_p, _I64, _I64, _PTR, ctypes.c_int]
        self._nf4_rows.restype = None
        self._panel_rows = library.nibble_panel_rows
        self._panel_rows.argtypes = [_PTR, _I64, _I64, _I64, _PTR, ctypes.c_int]
        self._panel_rows.restype = None
        self.steps = Steps(library)
        self.halves = DecoderHalves(library)
        self.isa = self.select(os.environ.get("NIBBLE_ISA"))

    def select(self, name: str | None = None) -> str:
        """Use one instruction set: avx512, avx2, portable; None for the best this CPU has."""
        chosen: bytes | None = self._select(name.encode() if name else None)
        if chosen is None:
            raise ValueError(f"NIBBLE_ISA={name}: not one of avx512, avx2, portable this CPU has")
        self.isa = chosen.decode()
        return self.isa

    @property
    def fast_isa(self) -> str:
        """What the fast products run on: vnni, avx2, neon or portable."""
        return str(self._fast_name().decode())

    @property
    def fast_levels(self) -> Tensor:
        """The levels of NF4 as those products take them: float64 [16]."""
        steps = torch.empty(16, dtype=torch.int32)
        unit: float = self._fast_levels(steps.data_ptr())
        return steps.double() * unit

    @property
    def fast_bytes(self) -> Tensor:
        """The bytes of a weight in 8 bits as those products take them: float64 [256]."""
        values = torch.empty(256)
        self._fast_bytes(values.data_ptr())
        return values.double()

    def nf4_linear(
        self, x: Tensor, weight: NF4Weight, bias: Tensor | None, y: Tensor | None = None
    ) -> Tensor:
        out, width = weight.shape
        if y is None:
            y = torch.empty((*x.shape[:-1], out), dtype=torch.float32)
        if x.numel():
            failed = self._nf4_linear(
                weight.record,
                x.data_ptr(),
                x.numel() // width,
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                torch.get_num_threads(),
            )
            check(failed)
        return y

    def fast_linears(
        self,
        x: Tensor,
        weights: Sequence[PanelWeight],
        biases: Sequence[Tensor | None],
        ys: Sequence[Tensor] | None = None,
        terms: Sequence[LowRankPlan] = (),
    ) -> Sequence[Tensor]:
        """x Wᵀ + b for each weight: x is rounded to 8 bits once for all of them. `terms`: those in
        8 bits that go with each weight, or none at all."""
        width = weights[0].shape[1]
        plans = terms or [_NO_TERMS] * len(weights)
        if ys is None:
            ys = [torch.empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32) for w in weights]
        if x.numel():
            products = b"".join(
                _PRODUCT.pack(
                    weight.panels.data_ptr(),
                    0 if bias is None else bias.data_ptr(),
                    y.data_ptr(),
                    weight.shape[0],
                    weight.bits,
                    plan.address,
                    len(plan.segments),
                )
                for weight, bias, y, plan in zip(weights, biases, ys, plans, strict=True)
            )
            failed = self._fast_linear(
                products,
                len(weights),
                x.data_ptr(),
                width,
                x.numel() // width,
                torch.get_num_threads(),
            )
            check(failed)
        return ys

    def rows(self, weight: Weight, start: int, stop: int, to: Tensor) -> Tensor:
        """Rows [start, stop) of W in NF4 as floats: `to` [stop - start, in], which is returned."""
        assert to.shape == (stop - start, weight.shape[1])
        assert to.is_contiguous()
        assert 0 <= start <= stop <= weight.shape[0]
        place = (start, stop, to.data_ptr(), torch.get_num_threads())
        if isinstance(weight, PanelWeight):
            assert weight.bits == 4, "8-bit panels have no such kernel"
            self._panel_rows(weight.panels.data_ptr(), weight.shape[1], *place)
        else:
            self._nf4_rows(weight.record, *place)
        return to

    def lowrank_add(self, y: Tensor, x: Tensor, plan: LowRankPlan) -> Tensor:
        if plan.segments:
            failed = self._lowrank_add(
                plan.records,
                len(plan.segments),
                x.data_ptr(),
                x.shape[1],
                y.data_ptr(),
                y.shape[1],
                plan.workspace,
                torch.get_num_threads(),
            )
            check(failed)
        return y

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        scale: float,
        sliding_window: int,
        softcap: float,
        out: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            out = torch.zeros_like(q)  # rows of no sequence stay zero
        call = _AttentionCall(
            *(t.data_ptr() for t in (q, k_cache, v_cache, block_tables, query_start, context_len)),
            out.data_ptr(),
            block_tables.shape[0],
            block_tables.shape[1],
            q.shape[1],
            k_cache.shape[2],
            q.shape[2],
            k_cache.shape[1],
            sliding_window,
            STORED[k_cache.dtype],
            q.shape[0],
            k_cache.shape[0],
            scale,
            softcap,
        )
        check(self._attention(call, torch.get_num_threads()))
        return out

    def cache_write(self, cache: Tensor, slots: Tensor, x: Tensor) -> None:
        call = _CacheCall(
            *(t.data_ptr() for t in (x, cache, slots)),
            *x.shape,
            STORED[cache.dtype],
            cache.shape[0] * cache.shape[1],
        )
        if self._cache_write(call, torch.get_num_threads()):
            raise ValueError(f"slots must be places of the cache, 0 to {call.places - 1}")


def load(folder: Path | None = None) -> tuple[Native | None, str]:
    """The library of `folder` and one line about it.

    NIBBLE_NATIVE=0 leaves it out; else NIBBLE_NATIVE may name the folder. Default: this package.
    """
    asked = os.environ.get("NIBBLE_NATIVE")
    if asked == "0":
        return None, "off: NIBBLE_NATIVE=0"
    folder = folder or Path(asked or Path(__file__).parent)
    path = folder / LIBRARY
    if not path.exists():
        reason = folder / REASON
        why = reason.read_text().strip() if reason.exists() else "python -m base.kernels.build"
        return None, f"not built: {why}"
    try:
        native = Native(path)
    except (OSError, AttributeError, ValueError) as error:
        return None, f"not loaded: {error}"
    why = ", as NIBBLE_ISA asks" if os.environ.get("NIBBLE_ISA") else ""
    return native, native.isa + why
