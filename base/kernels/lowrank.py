"""What an adapter adds to one linear layer, in the form the kernels take it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .rounded import RoundedFactor

_STORED = {torch.float32: 0, torch.bfloat16: 1}
_ROUNDED = 2
Factor = Tensor | RoundedFactor

# One `lowrank_segment` of csrc/kernels.h: the span, then the rest.
_SPAN = struct.Struct("=qq")
_REST = struct.Struct("=QQQQQqqq")


@dataclass(frozen=True, eq=False)
class LowRank:
    """One term of the adapter operator: y = gain * (y + B (d * (A x))) + bias.

    Any part may be missing: no `a` and `b` leaves only the scale and the bias (IA3, BitFit), no
    `gain` means 1, no `bias` 0, no `d` 1. `a` and `b` are float32 or bfloat16 and are read as
    float32; the vectors are float32. `b` is kept with its columns contiguous, which is what the
    kernel streams: a row-major `b` is copied here, once, so drop your own. Or both are in 8 bits.
    """

    a: Factor | None = None  # [r, in]
    b: Factor | None = None  # [out, r]; memory order [r, out]
    d: Tensor | None = None  # [r]
    gain: Tensor | None = None  # [out]
    bias: Tensor | None = None  # [out]

    def __post_init__(self) -> None:
        if (self.a is None) != (self.b is None):
            raise ValueError("a low-rank term needs both a and b, or neither")
        if self.a is not None and self.b is not None:
            shapes = tuple(self.a.shape), tuple(self.b.shape)
            if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
                raise ValueError(
                    "a must be [r, in] and b [out, r] with the same r, got "
                    f"{list(shapes[0])} and {list(shapes[1])}"
                )
            self._check_kept(self.a, self.b)
        for name, vector, size in (
            ("d", self.d, self.rank),
            ("gain", self.gain, self.out_features),
            ("bias", self.bias, self.out_features),
        ):
            if vector is None:
                continue
            if vector.dtype != torch.float32 or vector.shape != (size,):
                raise ValueError(
                    f"{name} must be float32 [{size}], got {vector.dtype} {list(vector.shape)}"
                )
            object.__setattr__(self, name, vector.contiguous())

    def _check_kept(self, a: Factor, b: Factor) -> None:
        if isinstance(a, RoundedFactor) or isinstance(b, RoundedFactor):
            sides = [getattr(factor, "side", None) for factor in (a, b)]
            if sides != ["A", "B"]:
                raise ValueError("a and b must both be in 8 bits, `of_a` and `of_b`, or neither")
            return
        for name, matrix in (("a", a), ("b", b)):
            if matrix.dtype not in _STORED:
                raise ValueError(f"{name} must be float32 or bfloat16, got {matrix.dtype}")
        object.__setattr__(self, "a", a.contiguous())
        object.__setattr__(self, "b", b.t().contiguous().t())

    def matrices(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] as the products read them, or None where there are none."""
        if self.a is None or self.b is None:
            return None
        return _dense(self.a), _dense(self.b)

    @property
    def rounded(self) -> bool:
        """Are the factors in 8 bits?"""
        return isinstance(self.a, RoundedFactor)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def in_features(self) -> int | None:
        """Width of x, or None where nothing reads it."""
        return None if self.a is None else self.a.shape[1]

    @property
    def out_features(self) -> int | None:
        """Width of y, or None for an empty term."""
        for part in (self.b, self.gain, self.bias):
            if part is not None:
                return part.shape[0]
        return None

    @property
    def device(self) -> torch.device | None:
        for part in (self.b, self.gain, self.bias):
            if part is not None:
                return part.device
        return None

    @property
    def nbytes(self) -> int:
        return sum(
            t.nbytes for t in (self.a, self.b, self.d, self.gain, self.bias) if t is not None
        )

    @cached_property
    def _inner(self) -> Tensor | None:
        """d as the library reads it: of B in 8 bits it has what the columns were divided by."""
        columns = self.b.columns if isinstance(self.b, RoundedFactor) else None
        if columns is None or self.d is None:
            return self.d if columns is None else columns
        return self.d * columns

    @cached_property
    def record(self) -> bytes:
        """The C description without its span. It holds addresses: valid while this object lives."""
        pointers = (
            0 if part is None else part.data_ptr()
            for part in (self.a, self.b, self._inner, self.gain, self.bias)
        )
        stored = [_stored(part) for part in (self.a, self.b)]
        return _REST.pack(*pointers, self.rank, *stored)


def _dense(factor: Factor) -> Tensor:
    return factor.dense() if isinstance(factor, RoundedFactor) else factor


def _stored(factor: Factor | None) -> int:
    """As `lowrank_segment` numbers it."""
    if factor is None:
        return 0
    return _ROUNDED if isinstance(factor, RoundedFactor) else _STORED[factor.dtype]


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a batch and what one adapter adds to them."""

    start: int
    stop: int
    term: LowRank


class LowRankPlan:
    """The segments of one layer in one batch, checked and laid out for the kernel once.

    Keep it as long as the composition of the batch stays the same: decode steps of the same
    sequences use the same plan, whatever x is. Segments may touch the same rows (an adapter of
    several terms): they run in the order given, so put `gain` and `bias` on the last of them.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self.records = b"".join(
            [_SPAN.pack(s.start, s.stop) + s.term.record for s in self.segments]
        )
        self.rows = max((s.stop for s in self.segments), default=0)
        # Length of the workspace for all A x, in floats.
        self.workspace = sum((s.stop - s.start) * s.term.rank for s in self.segments)
        self.in_features = self._agreed("in_features")
        self.out_features = self._agreed("out_features")
        self.on_cpu = all(
            s.term.device is None or s.term.device.type == "cpu" for s in self.segments
        )
        if any(not 0 <= s.start <= s.stop for s in self.segments):
            spans = [(s.start, s.stop) for s in self.segments]
            raise ValueError(f"segments need 0 <= start <= stop, got {spans}")

    @property
    def address(self) -> int:
        """Of the records: valid while this object lives."""
        return ctypes.cast(ctypes.c_char_p(self.records), ctypes.c_void_p).value or 0

    def _agreed(self, name: str) -> int | None:
        widths = {getattr(s.term, name) for s in self.segments} - {None}
        if len(widths) > 1:
            raise ValueError(f"the segments of one layer differ in {name}: {sorted(widths)}")
        return widths.pop() if widths else None

    def check(self, y: Tensor, x: Tensor) -> None:
        """Raise ValueError where y [T, out] or x [T, in] do not fit these segments."""
        if y.dim() != 2 or x.dim() != 2 or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"y must be [T, out] and x [T, in], got {list(y.shape)} and {list(x.shape)}"
            )
        for what, tensor, width in (("y", y, self.out_features), ("x", x, self.in_features)):
            if width is not None and tensor.shape[1] != width:
                raise ValueError(f"{what} has {tensor.shape[1]} columns, the terms need {width}")
        if self.rows > y.shape[0]:
            raise ValueError(f"a segment ends at row {self.rows}, the batch has {y.shape[0]}")
