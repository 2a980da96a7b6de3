"""The C functions that stand beside the NF4 products in a decoder layer, on float32 tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_I64 = ctypes.c_int64
_PTR = ctypes.c_void_p
_INT = ctypes.c_int
_STORED = {torch.float32: 0, torch.bfloat16: 1}

# What `nibble_each` does: the enum of csrc/step.h.
SILU, GELU_TANH, _SOFTCAP, _ADD = range(4)


class NormOwner(ctypes.Structure):
    """`norm_owner` of csrc/decoder.h."""

    _fields_ = [("start", _I64), ("stop", _I64), ("weight", _PTR)]


class _NormCall(ctypes.Structure):
    """`norm_call` of csrc/decoder.h."""

    _fields_ = [
        *((name, _PTR) for name in ("x", "add", "weight", "own", "sum", "y")),
        *((name, _I64) for name in ("rows", "width", "each", "owners")),
        ("eps", ctypes.c_float),
        ("shift", ctypes.c_float),
    ]


class Steps:
    """Callers have checked shapes; all tensors are contiguous float32 on the CPU.

    The bits of a row, or of a value, depend on nothing but that row or value: not on the number
    of rows, their place, or the number of threads.
    """

    def __init__(self, library: Any) -> None:
        self._dense = library.nibble_dense_linear
        self._dense.argtypes = [*(_PTR, _I64, _PTR, _I64, _I64, _I64, _PTR, _PTR), _INT]
        self._norm = library.nibble_norm
        self._norm.argtypes = [ctypes.POINTER(_NormCall), _INT]
        self._norm.restype = None
        self._rotary = library.nibble_rotary
        self._rotary.argtypes = [*(_PTR, _PTR, _PTR, _I64, _I64, _I64), _INT]
        self._rotary.restype = None
        self._each = library.nibble_each
        self._each.argtypes = [_INT, _PTR, _PTR, ctypes.c_float, _PTR, _I64, _INT]
        self._each.restype = None
        self._reduce = library.nibble_reduce
        self._reduce.argtypes = [*(_PTR, _I64, _I64, _I64, _PTR, _PTR), _INT]
        self._largest = library.nibble_largest
        self._largest.argtypes = [_PTR, _I64, _I64, _PTR, _PTR]
        self._largest.restype = None

    def dense_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None = None
    ) -> Tensor:
        """x Wᵀ + b: x [..., in], W [out, in] float32 or bfloat16 -> y [..., out]."""
        out, width = weight.shape
        if y is None:
            y = torch.empty((*x.shape[:-1], out), dtype=torch.float32)
        if y.numel():
            failed = self._dense(
                weight.data_ptr(),
                _STORED[weight.dtype],
                x.data_ptr(),
                y.numel() // out,
                width,
                out,
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                torch.get_num_threads(),
            )
            if failed:
                raise MemoryError("no memory for the workspace of a kernel")
        return y

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        shift: float = 0.0,
        *,
        add: Tensor | None = None,
        total: Tensor | None = None,
        own: Sequence[tuple[int, int, Tensor]] = (),
        each: int = 1,
        y: Tensor | None = None,
    ) -> Tensor:
        """(weight + shift) s / sqrt(mean(s²) + eps) over the last axis, s = x + add.

        x, add [..., width]; `total` receives s; `own` are (start, stop, weight) of tokens with a
        weight of their own, where a token is `each` adjacent rows. y may be x.
        """
        if y is None:
            y = torch.empty_like(x)
        owners = (NormOwner * len(own))(*(NormOwner(a, b, w.data_ptr()) for a, b, w in own))
        call = _NormCall(
            x.data_ptr(),
            None if add is None else add.data_ptr(),
            weight.data_ptr(),
            ctypes.addressof(owners),
            None if total is None else total.data_ptr(),
            y.data_ptr(),
            x.numel() // x.shape[-1],
            x.shape[-1],
            each,
            len(own),
            eps,
            shift,
        )
        self._norm(call, torch.get_num_threads())
        return y

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [T, heads, dim] in place by cos, sin [T, dim]; the two halves of dim pair up."""
        self._rotary(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape, _threads())
        return x

    def gated(self, kind: int, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up, written to gate."""
        self._run(kind, gate, up.data_ptr(), 0.0)
        return gate

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, written to x."""
        self._run(_ADD, x, y.data_ptr(), 0.0)
        return x

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap tanh(x / cap), written to x."""
        self._run(_SOFTCAP, x, None, cap)
        return x

    def greedy(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Argmax, int64, and logsumexp of each row of [rows, width]; rows may be apart."""
        rows, width = logits.shape
        best = torch.empty(rows, dtype=torch.int64)
        log_sum = torch.empty(rows)
        place = (logits.data_ptr(), rows, width, logits.stride(0))
        if self._reduce(*place, best.data_ptr(), log_sum.data_ptr(), _threads()):
            raise MemoryError("no memory for the workspace of a kernel")
        return best, log_sum

    def largest(self, row: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of a row [width] and their places; 0 < count <= width."""
        values, places = torch.empty(count), torch.empty(count, dtype=torch.int64)
        self._largest(row.data_ptr(), len(row), count, values.data_ptr(), places.data_ptr())
        return values, places

    def _run(self, kind: int, x: Tensor, other: int | None, cap: float) -> None:
        self._each(kind, x.data_ptr(), other, cap, x.data_ptr(), x.numel(), _threads())


def _threads() -> int:
    return torch.get_num_threads()
