"""What stands beside the NF4 products: low-rank terms, attention, the output head, reductions.

Each row says how far it is from the machine: the least time that its bytes or its multiply-adds can
take, whichever is more, over the time that it took. Operands rotate through more memory than the
caches hold, but for the logits that are reduced: the head has just written those.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import native
from .lowrank import LowRank, LowRankPlan, Segment
from .panels import PanelWeight
from .rounded import RoundedFactor
from .weight import NF4Weight

Run = Callable[[], object]
WIDTH, OUT = 896, 4864  # of the low-rank terms
HEADS, KV_HEADS, DIM, PAGE = 14, 2, 64, 16  # of the attention
VOCABULARY, HIDDEN = 151_936, 896  # of the head
RANKS, SEGMENTS, STORED = (8, 16, 64), (1, 8, 32), ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Task:
    """One kernel on one size: what to run, and what it moves and multiplies at least."""

    name: str
    size: str
    run: Run
    nbytes: int
    multiply_adds: int
    in_bytes: bool = False  # do the products multiply bytes?

    def of_limit(self, seconds: float, read: float, float32: float, int8: float | None) -> float:
        """The least time over `seconds`. read in GB/s; the others in 1e9 operations a second, two
        for each multiply-add."""
        speed = (int8 or float32) if self.in_bytes else float32
        return max(1e-9 * self.nbytes / read, 2e-9 * self.multiply_adds / speed) / seconds


def tasks(library: native.Native, rotation: int) -> Iterator[Task]:
    """All of them; `rotation`: bytes of operands that each rotates through."""
    for kept, segments, rank in itertools.product(STORED, SEGMENTS, RANKS):
        yield lowrank_task(library, rotation, kept, segments, rank)
    for terms in ("no terms", "8 LoRA", "8 DoRA"):
        yield product_task(library, rotation, terms)
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (1, 64)):
        yield attention_task(library, rotation, dtype, tokens)
    for rows in (1, 8):
        yield head_task(library, rows)
    for rows in (1, 8):
        yield reduction_task(library, rows)


def lowrank_task(
    library: native.Native, rotation: int, kept: str, segments: int, rank: int
) -> Task:
    """y += B (A x): a row for each segment, and each segment an adapter of its own."""
    term = _term(kept, rank)
    nbytes = segments * term.nbytes
    plans = itertools.cycle(
        [
            LowRankPlan([Segment(i, i + 1, _copied(term)) for i in range(segments)])
            for _ in range(max(1, rotation // nbytes))
        ]
    )
    x, y = torch.randn(segments, WIDTH), torch.zeros(segments, OUT)
    return Task(
        "low rank",
        f"r {rank}, {segments} of {kept}",
        lambda: library.lowrank_add(y, x, next(plans)),
        nbytes,
        segments * rank * (WIDTH + OUT),
    )


def product_task(library: native.Native, rotation: int, terms: str, rank: int = 16) -> Task:
    """The fast product of 8 rows, and in the same call what an adapter of its own adds to each."""
    weight = PanelWeight.pack(NF4Weight.quantize(torch.randn(OUT, WIDTH), double_quant=False))
    term = replace(_term("int8", rank), gain=torch.ones(OUT) if terms == "8 DoRA" else None)
    count = 0 if terms == "no terms" else 8
    nbytes = weight.nbytes + count * term.nbytes
    operands = itertools.cycle(
        [
            (
                replace(weight, panels=weight.panels.clone()),
                LowRankPlan([Segment(i, i + 1, _copied(term)) for i in range(count)]),
            )
            for _ in range(max(1, rotation // nbytes))
        ]
    )
    x, y = torch.randn(8, WIDTH), torch.zeros(8, OUT)

    def run() -> object:
        panels, plan = next(operands)
        return library.fast_linears(x, [panels], [None], [y], [plan])

    return Task(
        "product and terms",
        f"8 rows, {terms}",
        run,
        nbytes,
        8 * WIDTH * OUT + count * rank * (WIDTH + OUT),
        in_bytes=True,
    )


def _term(kept: str, rank: int) -> LowRank:
    a, b = torch.randn(rank, WIDTH) / 30, torch.randn(OUT, rank) / 30
    if kept == "int8":
        return LowRank(RoundedFactor.of_a(a), RoundedFactor.of_b(b))
    dtype = torch.bfloat16 if kept == "bfloat16" else torch.float32
    return LowRank(a.to(dtype), b.to(dtype))


def _copied(term: LowRank) -> LowRank:
    """The same numbers in memory of their own."""
    a, b = term.a, term.b
    gain = None if term.gain is None else term.gain.clone()
    if isinstance(a, RoundedFactor) and isinstance(b, RoundedFactor):
        own = replace(a, panels=a.panels.clone()), replace(b, panels=b.panels.clone())
        return LowRank(*own, gain=gain)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return LowRank(a.clone(), b.clone(), gain=gain)


def attention_task(
    library: native.Native, rotation: int, dtype: torch.dtype, tokens: int, context: int = 1024
) -> Task:
    """8 sequences of `context` keys, each with `tokens` new ones."""
    sequences, pages = 8, context // PAGE
    shape = (sequences * pages, PAGE, KV_HEADS, DIM)
    nbytes = 2 * sequences * context * KV_HEADS * DIM * dtype.itemsize
    caches = itertools.cycle(
        [
            (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
            for _ in range(max(1, rotation // nbytes))
        ]
    )
    q = torch.randn(sequences * tokens, HEADS, DIM)
    index = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    starts = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    seen = sum(context - i for i in range(tokens))  # keys of a sequence's new tokens together

    def run() -> Tensor:
        k, v = next(caches)
        return library.paged_attention(q, k, v, index, starts, lengths, DIM**-0.5, 0, 0.0)

    return Task(
        "attention",
        f"8 x {tokens} over {context}, {str(dtype).removeprefix('torch.')}",
        run,
        nbytes,
        2 * sequences * seen * HEADS * DIM,
    )


def head_task(library: native.Native, rows: int) -> Task:
    """Logits of a head in 8 bits, which is larger than the caches by itself."""
    blocks = -(-VOCABULARY // 32), HIDDEN // 64, 32 * 64 + 4 * 32
    panels = torch.randint(1, 256, blocks, dtype=torch.uint8)
    panels[..., -4 * 32 :] = torch.full((32,), 1e-4).view(torch.uint8)
    weight, x = PanelWeight(panels, (VOCABULARY, HIDDEN), 8), torch.randn(rows, HIDDEN)
    return Task(
        "head in 8 bits",
        f"{rows} x {VOCABULARY} x {HIDDEN}",
        lambda: library.fast_linears(x, [weight], [None]),
        weight.nbytes,
        rows * VOCABULARY * HIDDEN,
        in_bytes=True,
    )


def reduction_task(library: native.Native, rows: int) -> Task:
    """Argmax and logsumexp; of its arithmetic only the additions are counted."""
    logits = torch.randn(rows, VOCABULARY)
    return Task(
        "argmax, logsumexp",
        f"{rows} x {VOCABULARY}",
        lambda: library.steps.greedy(logits),
        logits.nbytes,
        logits.numel(),
    )


def sets_of(library: native.Native, names: Sequence[str]) -> list[str]:
    """Those of the named instruction sets that this CPU has."""
    found = []
    for name in names:
        try:
            library.select(name)
        except ValueError:
            continue
        found.append(name)
    library.select()
    return found
