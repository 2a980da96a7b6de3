"""The kernels alone: `python -m base.kernels.bench`. Each figure beside the machine's limits: NF4
products of many shapes, then what bench_steps.py lists, on each instruction set of this CPU.

`fast` is the product in 8 bits (panels.py); its arithmetic limit is that of bytes, four times that
of float32 where there is VNNI. With one thread its CPU time is counted, else the time on the wall.

Instruction sets take turns, round after round, and the best round of each counts: other work on
the machine only ever makes a round slower. Weights rotate through more memory than the caches
hold, as the layers of a model do: few rows measure memory, many rows measure arithmetic.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from base.machine import inspect

from . import bench_page, bench_steps, native
from .bench_page import Row
from .panels import PanelWeight, can_pack
from .weight import NF4Weight

SHAPES = "896x896,128x896,4864x896,896x4864,256x768,768x256,128x256,4096x4096,11008x4096"
SETS = ("avx512", "avx2", "portable")
ROTATION = 96 << 20  # bytes of packed weights that a candidate rotates through


@dataclass(frozen=True)
class Measure:
    """The best and the median seconds of one product, y [rows, out] = x Wᵀ."""

    name: str
    out: int
    width: int
    rows: int
    weight_bytes: int
    best: float
    median: float

    @property
    def gflops(self) -> float:
        return 2e-9 * self.out * self.width * self.rows / self.best

    @property
    def gbytes(self) -> float:
        """NF4 bytes read for each second, in 1e9."""
        return 1e-9 * self.weight_bytes / self.best

    def of_limit(self, limits: Limits) -> float:
        """The least time that the product can take here over the time that it took."""
        arithmetic = limits.int8 if self.name.endswith("fast") and limits.int8 else limits.float32
        return max(self.gbytes / limits.read, self.gflops / arithmetic)


@dataclass(frozen=True)
class Limits:
    """Of the machine, measured: GB/s of reading; 1e9 operations a second, of bytes if torch can."""

    read: float
    float32: float
    int8: float | None

    @classmethod
    def measured(cls) -> Limits:
        return cls(memory_limit(), arithmetic_limit(), int8_limit())


def race(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Run the candidates in turns for about `seconds`; the times of each, sorted."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 3:
        for name, run in candidates.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: sorted(taken) for name, taken in times.items()}


def memory_limit(seconds: float = 1.0) -> float:
    """GB/s of reading: the sum of 256 MB."""
    block = torch.ones(64 << 20)
    return 1e-9 * block.nbytes / race({"sum": block.sum}, seconds)["sum"][0]


def arithmetic_limit(seconds: float = 1.0) -> float:
    """GFLOP/s in float32: torch's own product of 1024x1024 matrices."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2e-9 * 1024**3 / race({"mm": lambda: a @ b}, seconds)["mm"][0]


def int8_limit(seconds: float = 1.0) -> float | None:
    """1e9 operations a second in bytes: the same product; None where torch has none."""
    a, b = (torch.randint(-127, 128, (1024, 1024), dtype=torch.int8) for _ in range(2))
    try:
        return 2e-9 * 1024**3 / race({"mm": lambda: torch._int_mm(a, b)}, seconds)["mm"][0]
    except (RuntimeError, AttributeError):
        return None


def measure(
    shape: tuple[int, int], rows: int, double_quant: bool, seconds: float
) -> Iterator[Measure]:
    """The library on each instruction set of this CPU, and bitsandbytes' dequantise + matmul."""
    library, status = native.load()
    if library is None:
        raise SystemExit(f"the C library is missing: {status}")
    out, width = shape
    weight = NF4Weight.quantize(torch.randn(out, width), double_quant)
    copies = max(1, ROTATION // weight.nbytes)
    weights = [weight] + [replace(weight, packed=weight.packed.clone()) for _ in range(copies - 1)]
    x = torch.randn(rows, width)
    sets = bench_steps.sets_of(library, SETS)
    candidates = {name: _library_run(library, name, x, weights) for name in sets}
    if can_pack(weight):
        first = PanelWeight.pack(weight)
        panels = [replace(first, panels=first.panels.clone()) for _ in weights]
        candidates |= {f"{name} fast": _fast_run(library, name, x, panels) for name in sets}
    taken = race(candidates, seconds)
    # A race of its own: the OpenMP threads it leaves spinning would be in the way of the others.
    taken |= race({"bitsandbytes": _bitsandbytes_run(x, weights)}, seconds / 2)
    for name, times in taken.items():
        median = times[len(times) // 2]
        yield Measure(name, out, width, rows, weight.nbytes, times[0], median)


def _library_run(
    library: native.Native, isa: str, x: Tensor, weights: list[NF4Weight]
) -> Callable[[], object]:
    turn = itertools.cycle(weights)

    def run() -> Tensor:
        library.select(isa)
        return library.nf4_linear(x, next(turn), None)

    return run


def _fast_run(
    library: native.Native, isa: str, x: Tensor, weights: list[PanelWeight]
) -> Callable[[], object]:
    turn = itertools.cycle(weights)

    def run() -> object:
        library.select(isa)
        return library.fast_linears(x, [next(turn)], [None])

    return run


def _bitsandbytes_run(x: Tensor, weights: list[NF4Weight]) -> Callable[[], object]:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    turn = itertools.cycle(weights)
    first = weights[0]
    state = QuantState(
        first.scales(), first.shape, None, first.blocksize, "nf4", dtype=torch.float32
    )

    def run() -> Tensor:
        return functional.linear(x, dequantize_4bit(next(turn).packed.view(-1, 1), state))

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """`arguments`: of a command line; None: of this process's."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m base.kernels.bench")
    parser.add_argument("--shapes", default=SHAPES, help="out x in, separated by commas")
    parser.add_argument("--rows", default="1,4,8,32,256", help="rows of x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape and rows")
    parser.add_argument("--part", choices=("products", "steps"), help="one of them; default: both")
    parser.add_argument("--double-quant", action="store_true", help="scales quantised too")
    parser.add_argument("--markdown", type=Path, help="write the table to this page, as a section")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    limits = Limits.measured()
    setting = (
        f"{options.threads} threads; reads {limits.read:.1f} GB/s, float32 {limits.float32:.0f} "
        f"GFLOP/s, bytes {limits.int8 or 0:.0f} GOP/s"
    )
    print(f"{setting}; here {native.load()[1]}")
    rows: list[Row] = []
    if options.part != "steps":
        rows += _products(options, limits)
    if options.part != "products":
        rows += _steps(options.seconds, limits)
    if options.markdown:
        machine = f"{date.today().isoformat()}; {inspect().cpu}, {setting}."
        command = "nibble bench --kernel --markdown docs/PERFORMANCE.md"
        bench_page.put(options.markdown, bench_page.section(rows, machine, command))


def _products(options: argparse.Namespace, limits: Limits) -> Iterator[Row]:
    """Measures and prints one after the other."""
    print(
        f"{'out x in':>12} rows  {'':14} {'best µs':>9} {'median':>9} {'GFLOP/s':>8} {'GB/s':>6} "
        "of the limit"
    )
    for text in options.shapes.split(","):
        out, width = (int(n) for n in text.split("x"))
        for rows in (int(n) for n in options.rows.split(",")):
            for m in measure((out, width), rows, options.double_quant, options.seconds):
                share = m.of_limit(limits)
                print(
                    f"{text:>12} {rows:>4}  {m.name:14} {1e6 * m.best:9.1f} {1e6 * m.median:9.1f} "
                    f"{m.gflops:8.1f} {m.gbytes:6.2f} {100 * share:6.0f} %",
                    flush=True,
                )
                yield Row("NF4 product", f"{text}, {rows} rows", m.name, m.best, share)


def _steps(seconds: float, limits: Limits) -> Iterator[Row]:
    """Measures and prints one after the other."""
    library, status = native.load()
    if library is None:
        raise SystemExit(f"the C library is missing: {status}")
    sets = bench_steps.sets_of(library, SETS)
    print(f"{'':18} {'':26} {'':9} {'best µs':>9} {'median':>9} {'GB/s':>6} of the limit")
    for task in bench_steps.tasks(library, ROTATION):
        runs = {name: _on(library, name, task.run) for name in sets}
        for name, times in race(runs, seconds).items():
            share = task.of_limit(times[0], limits.read, limits.float32, limits.int8)
            print(
                f"{task.name:18} {task.size:26} {name:9} {1e6 * times[0]:9.1f} "
                f"{1e6 * times[len(times) // 2]:9.1f} {1e-9 * task.nbytes / times[0]:6.2f} "
                f"{100 * share:6.0f} %",
                flush=True,
            )
            yield Row(task.name, task.size, name, times[0], share)


def _on(library: native.Native, isa: str, run: Callable[[], object]) -> Callable[[], object]:
    def selected() -> object:
        library.select(isa)
        return run()

    return selected


if __name__ == "__main__":
    main()
