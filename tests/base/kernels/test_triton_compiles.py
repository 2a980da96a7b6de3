"""Triton's compiler and ptxas take every kernel for the A100 and the H100, without a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Bytes of shared memory: a program may have 99 KiB where there is least (sm_86, sm_89).
SHARED = 96 << 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype"), [(80, "fp32"), (80, "bf16"), (90, "bf16"), (90, "fp16")]
)
def test_kernels_compile(architecture: int, dtype: str) -> None:
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, signature, constants in _kernels(dtype):
        types = signature | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=kernel,
            signature={name: types[name] for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED, (kernel.__name__, constants)


def _kernels(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each kernel with the types of its arguments, and its constants as the launches have them."""
    from base.kernels import triton_attention, triton_lowrank, triton_nf4
    from base.kernels.slots import MOST_RANK

    x, floats, numbers = f"*{dtype}", "*fp32", "*i64"
    plan = {"h": floats, "segments": numbers, "tiles": numbers}
    tile = {"FIELDS": triton_lowrank._FIELDS, "ROWS": 16, "RANKS": 16}
    slots = {"h": floats, "records": numbers, "slot_stride": "i32", "tiles": "*i32"}
    shared = {"MOST": MOST_RANK, "ROWS": 16, "RANKS": 16}
    found: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (
            triton_lowrank._shrink,
            {"x": x, "x_stride": "i32", "width": "i32", **plan},
            {**tile, "COLUMNS": triton_lowrank.COLUMNS, "SPLIT": triton_lowrank.SPLIT},
        ),
        (
            triton_lowrank._expand,
            {"y": x, "y_stride": "i32", "outputs": "i32", "splits": "i32", **plan},
            {**tile, "OUTPUTS": triton_lowrank.OUTPUTS},
        ),
        (
            triton_lowrank._shrink_slots,
            {"x": x, **slots, "width": "i32"} | {"x_stride": "i32", "splits": "i32"},
            {**shared, "COLUMNS": triton_lowrank.COLUMNS, "SPLIT": triton_lowrank.SPLIT}
            | {"APART": triton_lowrank.APART},
        ),
        (
            triton_lowrank._expand_slots,
            {"y": x, **slots, "outputs": "i32"} | {"y_stride": "i32", "splits": "i32"},
            {**shared, "OUTPUTS": triton_lowrank.OUTPUTS},
        ),
        (
            triton_nf4._fold,
            {"sums": floats, "bias": x, "y": x}
            | dict.fromkeys(("rows", "outputs", "splits"), "i32"),
            {"HAS_BIAS": True, "OUTPUTS": 128},
        ),
    ]
    for group, even in ((256, True), (0, False)):
        names = ("nested_absmax", "nested_code", "nested_offset", "levels", "sums")
        sizes = ("x_stride", "rows", "outputs", "width", "split_width")
        found.append(
            (
                triton_nf4._product,
                {"x": x, "packed": "*u8", "absmax": "*u8" if group else floats}
                | dict.fromkeys(names, floats)
                | dict.fromkeys(sizes, "i32"),
                {"BLOCK": 64, "GROUP": group, "EVEN": even, "ROWS": triton_nf4.ROWS}
                | {"OUTPUTS": triton_nf4.OUTPUTS, "COLUMNS": triton_nf4.COLUMNS},
            )
        )
    for stored, width, share in (("i8", 144, 4), (dtype, 128, 7)):
        scales = floats if stored == "i8" else f"*{stored}"
        found.append(
            (
                triton_attention._attend,
                {"q": x, "y": x, "k_cache": f"*{stored}", "v_cache": f"*{stored}"}
                | dict.fromkeys(("k_scales", "v_scales"), scales)
                | dict.fromkeys(("tables", "starts", "contexts"), "*i32")
                | dict.fromkeys(("sequences", "pages", "window"), "i32")
                | dict.fromkeys(("scale", "softcap"), "fp32"),
                {"HEADS": 4 * share, "KEY_HEADS": 4, "DIM": 128, "WIDTH": width, "PADDED": 128}
                | {"PAGE": 16, "GROUP": 32, "TOKENS": 16 // share, "ROWS": 16}
                | {"KEYS": triton_attention.KEYS, "WINDOWED": share == 7, "CAPPED": share == 7},
            )
        )
    return found
