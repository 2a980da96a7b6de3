"""The operator against its formula and against PEFT, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from adapters.delta import (
    Bottleneck,
    Delta,
    EmbeddingDelta,
    LinearDelta,
    LoweredAdapter,
    LowRank,
    PrivateEmbedding,
    PrivateLinear,
    PrivateNorm,
)
from adapters.maps import BlockMap, PairMap, Sparse
from adapters.operator import OperatorContext, Segment, Segments, install
from base.kernels import NF4Weight
from base.nf4 import NF4Linear
from base.spec import LinearShape
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    ALL_LINEARS,
    ARCHITECTURES,
    ATTENTION,
    FEED_FORWARD,
    PeftOracle,
    make_adapter,
    make_base,
    random_tokens,
    relative_error,
)

WIDTH, OUT, VOCABULARY = 64, 96, 40


def adapter(deltas: dict[str, Delta], digest: str = "a" * 64) -> LoweredAdapter:
    return LoweredAdapter(digest, "lora", "unmerged", deltas)


class Toy(nn.Module):
    """One layer of each sort that the operator wraps, and a count of the base's linear rows."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.linear = NF4Linear(
            NF4Weight.quantize(torch.randn(OUT, WIDTH), double_quant=False),
            torch.randn(OUT) if bias else None,
        )
        self.base_rows = 0
        self.linear.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.base_rows += args[0].numel() // WIDTH

    @property
    def matrix(self) -> torch.Tensor:
        weight: NF4Weight = self.context.layers["linear"].weight
        return weight.dequantize()

    @property
    def b(self) -> torch.Tensor:
        bias: Any = self.context.layers["linear"].inner.bias
        return torch.zeros(OUT) if bias is None else bias.detach()

    def install(self) -> OperatorContext:
        spec: Any = SimpleNamespace(
            linears={"linear": LinearShape(OUT, WIDTH)}, embeddings={"embed": 0}, norms={"norm": 0}
        )
        self.context = install(self, spec)
        return self.context

    def run(self, x: torch.Tensor, *counts: tuple[int, LoweredAdapter | None]) -> torch.Tensor:
        """The linear layer over x [T, in] with (rows, adapter) one after the other: [T, out]."""
        self.context.segments = Segments.of(counts)
        with torch.inference_mode():
            return self.linear(x[None])[0]  # type: ignore[no-any-return]


@pytest.fixture
def toy() -> Toy:
    made = Toy()
    made.install()
    return made


def low_rank(rank: int, *, d: bool = False, seed: int = 1) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, WIDTH, generator=generator) / 8
    B = torch.randn(OUT, rank, generator=generator)
    return LowRank(A, B, torch.randn(rank, generator=generator) if d else None)


def formula(toy: Toy, x: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
    """The equation of adapters/delta.py, in float64, as it is written."""
    x, W = x.double(), toy.matrix.double()
    mapped = x if delta.p is None else delta.p.double() * x
    for block_map in delta.blocks:
        mapped = mapped @ matrix_of(block_map)
    inner = mapped @ W.t()
    for term in delta.low_rank:
        low = x @ term.A.double().t()
        inner = inner + (low if term.d is None else term.d.double() * low) @ term.B.double().t()
    if delta.sparse is not None:
        inner = inner + x @ delta.sparse.dense_rows(0, OUT, WIDTH).double().t()
    bias = toy.b if delta.bias is None else delta.bias
    inner = inner if delta.g is None else delta.g.double() * inner
    return (inner if delta.pairs is None else inner @ pairs_of(delta.pairs).t()) + bias.double()


def matrix_of(block_map: BlockMap) -> torch.Tensor:
    """The map as a matrix [WIDTH, WIDTH] in float64: x -> x P diag(blocks) Pᵀ."""
    blocks = block_map.blocks.double()
    size = blocks.shape[1]
    shared = [blocks[0]] * (WIDTH // size) if len(blocks) == 1 else list(blocks)
    P = torch.eye(WIDTH, dtype=torch.float64)
    if block_map.order is not None:
        P = P[:, block_map.order]
    return P @ torch.block_diag(*shared) @ P.t()


def pairs_of(pairs: PairMap) -> torch.Tensor:
    """The map as a matrix [OUT, OUT] in float64."""
    Q = torch.diag(pairs.own.double())
    for i in range(OUT):
        first = i % (2 * pairs.half) < pairs.half
        Q[i, i + pairs.half if first else i - pairs.half] = pairs.other[i]
    return Q


def blocks(count: int, *, deal: bool = False) -> BlockMap:
    size = WIDTH // 4 if count == 1 else WIDTH // count
    order = torch.randperm(WIDTH) if deal else None
    return BlockMap(torch.randn(count, size, size) / size**0.5, order)


def sparse(entries: int) -> Sparse:
    """Some rows without an entry, some places with two."""
    rows = torch.randint(0, OUT // 2, (entries,)).sort().values
    starts = torch.searchsorted(rows, torch.arange(OUT + 1)).int()
    columns = torch.randint(0, WIDTH // 4, (entries,), dtype=torch.int32)
    return Sparse(torch.randn(entries), columns, starts)


VECTORS = [torch.randn(OUT), torch.rand(WIDTH), torch.randn(OUT)]
LINEAR_DELTAS = {
    "low rank": LinearDelta((low_rank(3),)),
    "two terms with d": LinearDelta((low_rank(2), low_rank(5, d=True, seed=2))),
    "DoRA: two terms and g": LinearDelta((low_rank(4), low_rank(1, seed=3)), g=VECTORS[0]),
    "IA3 on the output: g alone": LinearDelta(g=VECTORS[0], bias=VECTORS[0] * VECTORS[2]),
    "IA3 on the input: p alone": LinearDelta(p=VECTORS[1]),
    "p beside a low rank, which reads x": LinearDelta((low_rank(3),), p=VECTORS[1]),
    "BitFit: bias alone": LinearDelta(bias=VECTORS[2]),
    "OFT: blocks": LinearDelta(blocks=(blocks(8),)),
    "OFT: one block for all": LinearDelta(blocks=(blocks(1),)),
    "BOFT: factors and g": LinearDelta(blocks=(blocks(16), blocks(4, deal=True)), g=VECTORS[0]),
    "small blocks": LinearDelta(blocks=(blocks(32, deal=True),)),
    "RoAd: pairs": LinearDelta(pairs=PairMap(VECTORS[0], VECTORS[2], 8), bias=VECTORS[2]),
    "pairs and the base's own bias": LinearDelta(pairs=PairMap(VECTORS[2], VECTORS[0], 48)),
    "SHiRA: sparse": LinearDelta(sparse=sparse(300)),
    "everything": LinearDelta(
        (low_rank(3, d=True),),
        *VECTORS,
        blocks=(blocks(1), blocks(8, deal=True)),
        sparse=sparse(50),
        pairs=PairMap(VECTORS[2], VECTORS[0], 3),
    ),
}


@pytest.mark.parametrize("bias", [True, False], ids=["base bias", "no base bias"])
@pytest.mark.parametrize("name", LINEAR_DELTAS)
def test_a_delta_is_the_formula_on_its_rows_alone(name: str, bias: bool) -> None:
    toy = Toy(bias=bias)
    toy.install()
    x, delta = torch.randn(7, WIDTH), LINEAR_DELTAS[name]
    y = toy.run(x, (2, None), (3, adapter({"linear": delta})), (2, None))
    assert relative_error(y[2:5], formula(toy, x[2:5], delta)) < 1e-6
    plain = formula(toy, x, LinearDelta())
    assert relative_error(y[:2], plain[:2]) < 1e-6
    assert relative_error(y[5:], plain[5:]) < 1e-6


def test_base_rows_have_the_same_bits_whatever_runs_beside_them(toy: Toy) -> None:
    x = torch.randn(6, WIDTH)
    alone = toy.run(x, (6, None))
    assert torch.equal(alone, toy.context.layers["linear"].inner(x))
    mixed = toy.run(x, (3, None), (3, adapter({"linear": LINEAR_DELTAS["everything"]})))
    # p makes the product read a copy of x; the values of these rows are the same.
    assert torch.equal(mixed[:3], alone[:3])


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "nf4"])
def test_a_private_matrix_replaces_the_base_and_saves_its_product(toy: Toy, kept: str) -> None:
    W, bias, x = torch.randn(OUT, WIDTH), torch.randn(OUT), torch.randn(9, WIDTH)
    weight: torch.Tensor | NF4Weight = W
    if kept == "nf4":
        weight = NF4Weight.quantize(W, double_quant=False)
        W = weight.dequantize()
    elif kept == "bfloat16":
        weight = W.bfloat16()
        W = weight.float()
    own = adapter({"linear": PrivateLinear(weight, bias)})
    other = LINEAR_DELTAS["DoRA: two terms and g"]
    y = toy.run(x, (1, None), (4, own), (2, adapter({"linear": other})), (2, own))
    private = x.double() @ W.double().t() + bias.double()
    assert relative_error(y[1:5], private[1:5]) < 1e-6
    assert relative_error(y[7:], private[7:]) < 1e-6
    assert relative_error(y[:1], formula(toy, x[:1], LinearDelta())) < 1e-6
    assert relative_error(y[5:7], formula(toy, x[5:7], other)) < 1e-6
    assert toy.base_rows == 3
    toy.run(x, (9, own))
    assert toy.base_rows == 3  # nobody needs the base: it is not read


def test_a_private_matrix_without_bias_has_none(toy: Toy) -> None:
    W, x = torch.randn(OUT, WIDTH), torch.randn(2, WIDTH)
    y = toy.run(x, (2, adapter({"linear": PrivateLinear(W)})))
    assert relative_error(y, x @ W.t()) < 1e-6


@pytest.mark.parametrize(
    "broken",
    [
        LinearDelta((LowRank(torch.full((2, WIDTH), torch.nan), torch.ones(OUT, 2)),)),
        LinearDelta(g=torch.full((OUT,), torch.nan), bias=torch.full((OUT,), torch.inf)),
        LinearDelta(p=torch.full((WIDTH,), torch.nan)),
        LinearDelta(blocks=(BlockMap(torch.full((1, 8, 8), torch.nan)),)),
        LinearDelta(pairs=PairMap(torch.full((OUT,), torch.nan), torch.ones(OUT), 4)),
        PrivateLinear(torch.full((OUT, WIDTH), torch.nan)),
    ],
    ids=["low rank", "g and bias", "p", "blocks", "pairs", "private"],
)
def test_nan_in_one_adapter_stays_in_its_rows(toy: Toy, broken: Delta) -> None:
    x, healthy = torch.randn(8, WIDTH), adapter({"linear": LINEAR_DELTAS["two terms with d"]})
    sick = adapter({"linear": broken}, digest="b" * 64)
    y = toy.run(x, (2, healthy), (3, sick), (2, healthy), (1, None))
    want = formula(toy, x, LINEAR_DELTAS["two terms with d"])
    assert not y[2:5].isfinite().any()
    assert relative_error(y[[0, 1, 5, 6]], want[[0, 1, 5, 6]]) < 1e-6
    assert relative_error(y[7:], formula(toy, x[7:], LinearDelta())) < 1e-6


def test_embedding_rows(toy: Toy) -> None:
    ids = torch.tensor([[3, 7, 3, 39, 0, 7]])
    A, B, g = torch.randn(2, VOCABULARY), torch.randn(WIDTH, 2), torch.rand(WIDTH)
    table: torch.Tensor = toy.context.layers["embed"].weight.detach()
    own = torch.randn(VOCABULARY, WIDTH)
    low = adapter({"embed": EmbeddingDelta(A, B, g)})
    toy.context.segments = Segments.of(
        [(2, low), (1, None), (3, adapter({"embed": PrivateEmbedding(own)}))]
    )
    with torch.inference_mode():
        rows = toy.embed(ids)[0]
    assert torch.equal(rows[2], table[3])
    assert torch.equal(rows[3:], own[ids[0, 3:]])
    assert relative_error(rows[:2], (g * (table + (B @ A).t()))[ids[0, :2]]) < 1e-6


def test_norm_rows_also_where_heads_stand_behind_the_tokens(toy: Toy) -> None:
    scale = torch.randn(WIDTH)
    toy.context.segments = Segments.of([(2, None), (3, adapter({"norm": PrivateNorm(scale)}))])
    inner = toy.context.layers["norm"].inner
    for shape in [(1, 5, WIDTH), (1, 5, 2, WIDTH)]:
        x = torch.randn(shape)
        with torch.inference_mode():
            y = toy.norm(x)
        assert torch.equal(y[:, :2], inner(x)[:, :2])
        assert relative_error(y[:, 2:], nn.functional.rms_norm(x, [WIDTH], scale)[:, 2:]) < 1e-6


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize(
    ("reads_output", "reads_stream"),
    [(True, False), (True, True), (False, True)],
    ids=["Houlsby", "Pfeiffer", "parallel"],
)
@torch.no_grad()
def test_a_bottleneck_stands_after_the_layer(
    extra: int, reads_output: bool, reads_stream: bool
) -> None:
    """r is what went into the norm before, of the same rows."""
    block = Block()
    c, u = torch.randn(5), torch.randn(WIDTH)
    D, U = torch.randn(5, WIDTH) / 8, torch.randn(WIDTH, 5)
    stream = "norm" if reads_stream or extra else None
    delta = Bottleneck(D, c, U, u, "silu", reads_output, reads_stream, extra, stream)
    r = torch.randn(1, 6, WIDTH)
    own = adapter({"linear": delta})
    block.context.segments = Segments.of([(2, None), (3, own), (1, None)])
    got = block(r)[0]
    block.context.segments = Segments.of([(6, None)])
    alone = block(r)[0]
    y, r = block.plain(r)[0], r[0]
    z = y * reads_output + r * reads_stream
    want = y + nn.functional.silu(z @ D.t() + c) @ U.t() + u + extra * r
    assert relative_error(got[2:5], want[2:5]) < 1e-6
    assert torch.equal(got[[0, 1, 5]], alone[[0, 1, 5]])
    assert relative_error(alone, y) < 1e-6
    assert not block.context.inputs  # taken, so that no step holds what it need not


class Block(nn.Module):
    """A norm and the layer after it, as they stand on the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.plain = nn.Sequential(self.norm, self.linear)
        spec: Any = SimpleNamespace(linears={"linear": 0}, embeddings={}, norms={"norm": 0})
        self.context = install(self, spec)

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(r))  # type: ignore[no-any-return]


# --- the context


def test_adjacent_rows_of_one_adapter_are_one_segment() -> None:
    first, second = adapter({}), adapter({})
    segments = Segments.of([(2, first), (0, second), (3, first), (1, None), (4, second)])
    spans = [(s.start, s.stop, s.adapter) for s in segments]
    assert spans == [(0, 5, first), (5, 6, None), (6, 10, second)]
    assert spans[0][2] is first
    assert spans[2][2] is second
    assert segments.rows == 10


@pytest.mark.parametrize("spans", [[(1, 2)], [(0, 2), (3, 4)], [(0, 3), (2, 4)], [(0, -1)]])
def test_segments_leave_no_gap_and_do_not_overlap(spans: Sequence[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="must start at row"):
        Segments(Segment(start, stop, None) for start, stop in spans)


def test_a_plan_is_kept_for_an_unchanged_batch_and_made_anew_for_another(toy: Toy) -> None:
    one, two = (adapter({"linear": LINEAR_DELTAS["low rank"]}, digest=d * 64) for d in "ab")
    toy.context.segments = Segments.of([(1, one), (1, two)])
    plan = toy.context.plans["linear"]
    toy.context.segments = Segments.of([(2, None)])
    assert toy.context.plans == {}
    toy.context.segments = Segments.of([(1, one), (1, two)])
    assert toy.context.plans["linear"] is plan
    for others in ([(1, two), (1, one)], [(2, one), (1, two)]):
        toy.context.segments = Segments.of(others)
        assert toy.context.plans["linear"] is not plan


def test_the_same_digest_lowered_again_is_another_adapter(toy: Toy) -> None:
    """One digest may be resident twice: merged and unmerged."""
    x = torch.randn(2, WIDTH)
    W = torch.randn(OUT, WIDTH)
    unmerged = adapter({"linear": LINEAR_DELTAS["low rank"]})
    merged = adapter({"linear": PrivateLinear(W)})
    first = toy.run(x, (2, unmerged))
    assert relative_error(toy.run(x, (2, merged)), x @ W.t()) < 1e-6
    assert torch.equal(toy.run(x, (2, unmerged)), first)


def test_a_forgotten_adapter_is_held_no_more(toy: Toy) -> None:
    import gc
    import weakref

    gone, stays = (LinearDelta((low_rank(2, seed=s),)) for s in (5, 6))
    tensor = weakref.ref(gone.low_rank[0].A)
    adapters = [adapter({"linear": d}, digest=n * 64) for d, n in ((gone, "a"), (stays, "b"))]
    x = torch.randn(2, WIDTH)
    toy.run(x, (1, adapters[0]), (1, adapters[1]))
    want = toy.run(x, (2, adapters[1]))
    toy.context.forget("a" * 64)
    del gone, adapters[0]
    gc.collect()
    assert tensor() is None
    assert torch.equal(toy.run(x, (2, adapters[0])), want)


def test_a_delta_for_a_layer_that_is_not_wrapped_is_an_error_never_skipped(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"model\.nowhere"):
        toy.context.segments = Segments.of([(1, adapter({"model.nowhere": LinearDelta()}))])


@pytest.mark.parametrize(
    ("path", "delta"),
    [
        ("linear", PrivateNorm(torch.ones(WIDTH))),
        ("embed", LinearDelta()),
        ("norm", PrivateLinear(torch.ones(1, 1))),
    ],
)
def test_a_delta_of_the_wrong_sort_is_an_error(toy: Toy, path: str, delta: Delta) -> None:
    with pytest.raises(TypeError, match=path):
        toy.context.segments = Segments.of([(1, adapter({path: delta}))])


def test_rows_that_nobody_announced_are_an_error(toy: Toy) -> None:
    toy.context.segments = Segments.of([(2, adapter({"linear": LINEAR_DELTAS["low rank"]}))])
    with pytest.raises(AssertionError, match="3 rows"):
        toy.linear(torch.randn(1, 3, WIDTH))


def test_a_model_is_wrapped_once(toy: Toy) -> None:
    with pytest.raises(ValueError, match="wrapped already"):
        toy.install()


# --- whole models against PEFT


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_peft_one_adapter_at_a_time(architecture: str, tmp_path: Path) -> None:
    server = Server(make_base(tmp_path / "base", architecture))
    everywhere = (*ALL_LINEARS, "lm_head", "embed_tokens")
    directories = [
        None,
        make_adapter(tmp_path / "lora", server.directory, "lora", rank=4),
        make_adapter(tmp_path / "q", server.directory, rank=7, targets=ATTENTION, seed=1),
        make_adapter(tmp_path / "rs", server.directory, "rslora", targets=FEED_FORWARD, seed=2),
        make_adapter(tmp_path / "dora", server.directory, "dora", rank=4, seed=3),
        make_adapter(tmp_path / "all", server.directory, "dora", rank=2, targets=everywhere),
    ]
    lowered = [None if path is None else server.lower(path) for path in directories]
    adapters: list[tuple[Path | None, LoweredAdapter | None, str | None]] = [
        (path, low, None) for path, low in zip(directories, lowered, strict=True)
    ]
    for kept in ("float32", "nf4"):
        merged = server.lower(tmp_path / "dora", placement="merged", merged_dtype=kept)
        adapters.append((tmp_path / "dora", merged, kept))
    prompts = [random_tokens(n, seed=n) for n in (5, 1, 9, 3, 12, 2, 8, 4)]
    oracles = [PeftOracle(server.directory, path, merged=kept) for path, _, kept in adapters]
    wanted = [oracle.logits(prompt) for oracle, prompt in zip(oracles, prompts, strict=True)]
    batch = [(prompt, low) for prompt, (_, low, _) in zip(prompts, adapters, strict=True)]
    for got, want in zip(server.run(batch), wanted, strict=True):
        assert relative_error(got, want) < 1e-5
    # The same with logits for the last tokens alone: the head's rows are others than the layers'.
    for got, want in zip(server.run(batch, last_only=True), wanted, strict=True):
        assert relative_error(got, want[-1:]) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision(dtype: str, tmp_path: Path) -> None:
    """Every sort of delta in one batch; near PEFT in float32, as near as the dtype allows."""
    server = Server(make_base(tmp_path / "base", "qwen3"), dtype)
    everywhere = (*ALL_LINEARS, "lm_head", "embed_tokens")
    dora = make_adapter(tmp_path / "dora", server.directory, "dora", targets=everywhere)
    saved = make_adapter(
        tmp_path / "saved",
        server.directory,
        targets=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens", "norm"],
        bias="all",
    )
    merged = server.lower(dora, placement="merged", merged_dtype="nf4")
    adapters = [
        (None, None, None),
        (dora, server.lower(dora), None),
        (saved, server.lower(saved), None),
        (dora, merged, "nf4"),
    ]
    tokens = random_tokens(12)
    got = server.run([(tokens, lowered) for _, lowered, _ in adapters])
    for logits, (path, _, kept) in zip(got, adapters, strict=True):
        want = PeftOracle(server.directory, path, merged=kept).logits(tokens)
        assert relative_error(logits, want) < 0.06
