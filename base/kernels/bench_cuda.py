"""The kernels on a GPU: `nibble bench --kernel --device cuda`. First whether they are right there.

Each candidate's time is the median of runs between two events on the device, candidates in turns,
after each has run once; the launch from Python is in it. Weights rotate through more memory than
the caches hold. Beside the NF4 product stand its bytes for each second and what a copy on the
device reaches (read and written).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..extras import install
from . import cuda, reference, triton_check
from .lowrank import LowRank, LowRankPlan, Segment
from .weight import NF4Weight

Candidates = dict[str, Callable[[], object]]

ROTATION = 512 << 20  # bytes of packed weights that a candidate rotates through
RANK = 16


def product_candidates(
    shape: tuple[int, int], rows: int, device: torch.device, rotation: int = ROTATION
) -> Candidates:
    """y = x Wᵀ with W in NF4, by Triton and by bitsandbytes, and with W in bfloat16 by torch."""
    from . import triton_nf4

    out, width = shape
    first = NF4Weight.quantize(torch.randn(out, width), double_quant=False).to(device)
    copies = max(1, rotation // first.nbytes)
    weights = [first] + [replace(first, packed=first.packed.clone()) for _ in range(copies - 1)]
    dense = torch.randn(max(1, copies // 4), out, width, device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    turns = [itertools.cycle(weights), itertools.cycle(weights)]
    dense_turn = itertools.cycle(dense)
    return {
        "triton": lambda: triton_nf4.nf4_linear(x, next(turns[0])),
        "bitsandbytes": lambda: cuda.nf4_linear(x, next(turns[1])),
        "bfloat16": lambda: functional.linear(x, next(dense_turn)),
    }


def lowrank_candidates(
    shape: tuple[int, int], adapters: int, rows: int, device: torch.device
) -> Candidates:
    """`rows` rows for each of some distinct adapters of rank 16 on one layer."""
    from . import triton_lowrank

    out, width = shape
    dtype = torch.bfloat16
    plan = LowRankPlan(
        [
            Segment(n * rows, (n + 1) * rows, LowRank(_draw(RANK, width, device), _b(out, device)))
            for n in range(adapters)
        ]
    )
    x = torch.randn(adapters * rows, width, device=device, dtype=dtype)
    y = torch.zeros(adapters * rows, out, device=device, dtype=dtype)
    return {
        "triton": lambda: triton_lowrank.lowrank_add(y, x, plan),
        "torch": lambda: reference.lowrank_add(y, x, plan),
    }


def _draw(rows: int, columns: int, device: torch.device) -> Tensor:
    drawn = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    return drawn.mul_(float(columns) ** -0.5)


def _b(out: int, device: torch.device) -> Tensor:
    return _draw(out, RANK, device)


def attention_candidates(sequences: int, context: int, device: torch.device) -> Candidates:
    """One new token for each of some sequences: 16 heads over 4 of keys, 128 wide, pages of 16."""
    from . import triton_attention

    pages = -(-context // 16)
    q = torch.randn(sequences, 16, 128, device=device, dtype=torch.bfloat16)
    k, v = (
        torch.randn(sequences * pages, 16, 4, 128, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    tables = torch.randperm(sequences * pages, device=device).to(torch.int32).view(sequences, -1)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    contexts = torch.full((sequences,), context, dtype=torch.int32, device=device)
    index = (tables, starts, contexts, 128**-0.5)
    return {
        "triton": lambda: triton_attention.paged_attention(q, k, v, *index),
        "torch": lambda: reference.paged_attention(q, k, v, *index),
    }


def race(candidates: Candidates, rounds: int) -> dict[str, float]:
    """Median seconds of each on the device."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start, stop = _event(), _event()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(1e-3 * start.elapsed_time(stop))
    return {name: median(taken) for name, taken in times.items()}


def limits(device: torch.device, rounds: int = 20) -> dict[str, float]:
    """What the device reaches: GB/s of a copy, read and written; GFLOP/s of a bfloat16 product."""
    block = torch.randn(128 << 20, device=device)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = race({"copy": block.clone, "product": lambda: a @ b}, rounds)
    return {
        "gbytes": 2e-9 * block.nbytes / taken["copy"],
        "gflops": 2e-9 * 8192**3 / taken["product"],
    }


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def main(arguments: Sequence[str] | None = None) -> None:
    """`arguments`: of a command line; None: of this process's."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m base.kernels.bench_cuda")
    parser.add_argument("--shapes", default="896x896,4864x896,4096x4096,11008x4096")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: torch.cuda.is_available() is false here")
    device = torch.device("cuda", torch.cuda.current_device())
    fault = triton_check.find_fault(device)
    if fault:
        raise SystemExit(f"{fault}; {install('cuda')}, then pytest -m cuda says more")
    most = limits(device, options.rounds)
    print(
        f"{torch.cuda.get_device_name(device)}; copies {most['gbytes']:.0f} GB/s, "
        f"multiplies {1e-3 * most['gflops']:.0f} TFLOP/s"
    )
    for shape in [tuple(int(n) for n in text.split("x")) for text in options.shapes.split(",")]:
        out, width = shape
        for rows in (1, 8, 32):
            taken = race(product_candidates((out, width), rows, device), options.rounds)
            read = 1e-9 * out * width * (0.5 + 4 / 64) / taken["triton"]
            _show(f"nf4 {out}x{width}, {rows} rows, {read:.0f} GB/s", taken)
        for adapters in (1, 8, 32, 64):
            taken = race(lowrank_candidates((out, width), adapters, 1, device), options.rounds)
            _show(f"lowrank {out}x{width}, {adapters} adapters", taken)
    for sequences, context in ((1, 512), (1, 8192), (32, 512), (32, 4096)):
        taken = race(attention_candidates(sequences, context, device), options.rounds)
        _show(f"attention, {sequences} of {context} keys", taken)


def _show(what: str, taken: dict[str, float]) -> None:
    times = "  ".join(f"{name} {1e6 * seconds:.1f} µs" for name, seconds in taken.items())
    print(f"{what:44} {times}", flush=True)


if __name__ == "__main__":
    main()
