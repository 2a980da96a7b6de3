"""What every wrapped layer is, and the context that tells it the plan of the running step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters.delta import Delta, LoweredAdapter
from base.fused import Adapters
from base.kernels import PLACES, AdapterTable, Spans

from .segments import Segments

_KEPT_STEPS = 16  # segmentations whose plans are kept: decode steps come back to the same ones


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """One adapter in the forms that steps want it, made once: what stays while it is resident."""

    adapter: LoweredAdapter
    parts: Mapping[str, Any]  # module path -> what its layer's `prepare` made
    reads: frozenset[str]  # keys of norms that keep their input for it
    table: AdapterTable | None  # its part of the fused layers
    apart: frozenset[int]  # fused layers whose tables cannot say all of it


class StepPlans(Mapping[str, Any]):
    """Module path -> plan, for one segmentation of rows. A plan is made when it is asked for: in
    fused layers nobody asks."""

    def __init__(
        self, layers: Mapping[str, AdaptedLayer], segments: Segments, owners: Sequence[_Held | None]
    ) -> None:
        self._layers = layers
        self._segments = segments  # kept alive: the key that these plans are found by holds ids
        self._owned = [(s, held) for s, held in zip(segments, owners, strict=True) if held]
        self._reads = frozenset(key for _, held in self._owned for key in held.reads)
        self._made: dict[str, Any] = {}
        self.owners = {id(held.adapter) for _, held in self._owned}
        tables = [(s.start, s.stop, held.table) for s, held in self._owned if held.table]
        apart = frozenset(index for _, held in self._owned for index in held.apart)
        self.adapters = Adapters(Spans([(a, b, t) for a, b, t in tables]), apart)

    def get(self, path: str, default: Any = None) -> Any:
        try:
            plan = self._made[path]
        except KeyError:
            plan = self._made[path] = self._plan(path)
        return default if plan is None else plan

    def __getitem__(self, path: str) -> Any:
        plan = self.get(path)
        if plan is None:
            raise KeyError(path)
        return plan

    def __contains__(self, path: object) -> bool:
        return path in self._reads or any(path in held.parts for _, held in self._owned)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(path for _, held in self._owned for path in held.parts))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _plan(self, path: str) -> Any:
        parts = [(s.start, s.stop, h.parts[path]) for s, h in self._owned if path in h.parts]
        return self._layers[path].plan(parts, self._segments.rows) if parts else None


class OperatorContext:
    """What the wrapped layers read: the plan of the step that runs now, by module path.

    The engine sets `segments` (rows of the token tensor) and `logit_segments` (rows that reach
    the output head) before each forward pass; both in one thread. Plans are kept for the last few
    segmentations, so that decode steps of an unchanged batch cost two look-ups. They hold their
    adapters: call `forget` when an adapter leaves its slot.
    """

    def __init__(self) -> None:
        self.layers: dict[str, AdaptedLayer] = {}
        self.head: str | None = None  # path of the output head, whose rows are `logit_segments`
        self.places: Mapping[str, int] = {}  # path -> place in the tables of fused layers
        self.plans: Mapping[str, Any] = {}  # module path -> plan of the running step
        self.inputs: dict[str, Tensor] = {}  # path of a norm -> its input, until a layer takes it
        self.adapters = Adapters(Spans())  # of the running step, for fused layers
        self._segments = Segments()
        self._logit_segments = Segments()
        self._kept: OrderedDict[Any, StepPlans] = OrderedDict()
        self._held: dict[int, _Held] = {}

    @property
    def segments(self) -> Segments:
        return self._segments

    @segments.setter
    def segments(self, segments: Segments) -> None:
        self._segments = segments
        self._select()

    @property
    def logit_segments(self) -> Segments:
        return self._logit_segments

    @logit_segments.setter
    def logit_segments(self, segments: Segments) -> None:
        self._logit_segments = segments
        self._select()

    def forget(self, digest: str) -> None:
        """Drop everything kept for an adapter; it must not be in the running step."""
        gone = {key for key, held in self._held.items() if held.adapter.digest == digest}
        for key in gone:
            del self._held[key]
        for kept in [k for k, plans in self._kept.items() if gone & plans.owners]:
            del self._kept[kept]
        for name in ("_segments", "_logit_segments"):
            if any(s.adapter and s.adapter.digest == digest for s in getattr(self, name)):
                setattr(self, name, Segments())
                self.plans, self.adapters = {}, Adapters(Spans())

    def parts_of(self, adapter: LoweredAdapter) -> Mapping[str, Any]:
        """Module path -> what its layer's `prepare` made of one adapter, once."""
        return self._prepared(adapter).parts

    def _select(self) -> None:
        tokens, logits = self._planned(self._segments), self._planned(self._logit_segments)
        self.adapters = Adapters(Spans()) if tokens is None else tokens.adapters
        at_head = None if logits is None or self.head is None else logits.get(self.head)
        if tokens is None:
            self.plans = {} if at_head is None else {str(self.head): at_head}
        elif self.head is None:
            self.plans = tokens
        else:
            self.plans = _WithHead(tokens, self.head, at_head)

    def _planned(self, segments: Segments) -> StepPlans | None:
        if segments.plain:
            return None
        kept = self._kept.get(segments.key)
        if kept is None:
            owners = [None if s.adapter is None else self._prepared(s.adapter) for s in segments]
            kept = self._kept[segments.key] = StepPlans(self.layers, segments, owners)
            if len(self._kept) > _KEPT_STEPS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(segments.key)
        return kept

    def _prepared(self, adapter: LoweredAdapter) -> _Held:
        held = self._held.get(id(adapter))
        if held is None:
            missing = sorted(adapter.deltas.keys() - self.layers.keys())
            if missing:
                raise ValueError(
                    f"adapter {adapter.digest[:12]} has a delta for {missing[0]}, "
                    "which the operator does not wrap"
                )
            parts = {p: self.layers[p].prepare(delta) for p, delta in adapter.deltas.items()}
            held = self._held[id(adapter)] = self._hold(adapter, parts)
        return held

    def _hold(self, adapter: LoweredAdapter, parts: Mapping[str, Any]) -> _Held:
        reads = {n for p, part in parts.items() for n in self.layers[p].reads_of(part)}
        apart = {self.places[norm] // PLACES for norm in reads if norm in self.places}
        if not self.places:
            return _Held(adapter, parts, frozenset(map(kept_input, reads)), None, frozenset())
        table = AdapterTable(1 + max(self.places.values()))
        for path in parts.keys() & self.places.keys():
            place = self.places[path]
            if not self.layers[path].put(parts[path], table, place):
                apart.add(place // PLACES)
        return _Held(adapter, parts, frozenset(map(kept_input, reads)), table, frozenset(apart))


class _WithHead(Mapping[str, Any]):
    """The plans of a step's tokens, but the output head has its own: other rows reach it."""

    def __init__(self, tokens: StepPlans, head: str, at_head: Any) -> None:
        self._tokens, self._head, self._at_head = tokens, head, at_head

    def get(self, path: str, default: Any = None) -> Any:
        if path != self._head:
            return self._tokens.get(path, default)
        return default if self._at_head is None else self._at_head

    def __getitem__(self, path: str) -> Any:
        plan = self.get(path)
        if plan is None:
            raise KeyError(path)
        return plan

    def __contains__(self, path: object) -> bool:
        return self._at_head is not None if path == self._head else path in self._tokens

    def __iter__(self) -> Iterator[str]:
        return (path for path in {**dict.fromkeys(self._tokens), self._head: 0} if path in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def kept_input(path: str) -> str:
    """The key among the plans that tells the norm at `path` to keep its input."""
    return f"{path}:input"


class AdaptedLayer(nn.Module):
    """A wrapped layer of the base: `inner` for the rows of no adapter, a plan for the others."""

    in_tables = True  # what this wrapper adds is in the tables of fused layers, or they are told

    def __init__(self, path: str, inner: nn.Module, context: OperatorContext) -> None:
        super().__init__()
        self.path = path
        self.inner = inner
        self.context = context

    @property
    def weight(self) -> Any:
        return self.inner.weight

    def prepare(self, delta: Delta) -> Any:
        """What this layer needs of one adapter, whatever the rows; TypeError for a wrong kind."""
        raise NotImplementedError

    def plan(self, parts: Sequence[tuple[int, int, Any]], rows: int) -> Any:
        """The plan of one step from (start, stop, what `prepare` made), in the order of rows."""
        return parts

    def reads(self, plan: Any) -> Iterable[str]:
        """The norms whose inputs this plan wants kept: they run before this layer."""
        del plan
        return ()

    def reads_of(self, part: Any) -> Iterable[str]:
        """The norms whose inputs one adapter's part wants kept."""
        return self.reads(self.plan([(0, 1, part)], 1))

    def put(self, part: Any, table: AdapterTable, place: int) -> bool:
        """Write what `prepare` made to the adapter's table of the fused layers; False where a
        table cannot say it, so that this layer must be called itself."""
        del part, table, place
        return False

    def wrong(self, delta: Delta) -> TypeError:
        return TypeError(f"{self.path} is no place for a {type(delta).__name__}")
