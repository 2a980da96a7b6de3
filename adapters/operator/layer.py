"""What every wrapped layer is, and the context that tells it the plan of the running step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from adapters.delta import Delta, LoweredAdapter

from .segments import Segments

_KEPT_STEPS = 16  # segmentations whose plans are kept: decode steps come back to the same ones


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
        self.plans: dict[str, Any] = {}  # module path -> plan of the running step
        self.inputs: dict[str, Tensor] = {}  # path of a norm -> its input, until a layer takes it
        self._segments = Segments()
        self._logit_segments = Segments()
        self._kept: OrderedDict[Any, tuple[Segments, dict[str, Any]]] = OrderedDict()
        self._terms: dict[int, tuple[LoweredAdapter, dict[str, Any]]] = {}

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
        held = {key for key, (adapter, _) in self._terms.items() if adapter.digest == digest}
        for key in held:
            del self._terms[key]
        for kept in [k for k in self._kept if held & {owner for _, owner in k[1]}]:
            del self._kept[kept]
        for name in ("_segments", "_logit_segments"):
            if any(s.adapter and s.adapter.digest == digest for s in getattr(self, name)):
                setattr(self, name, Segments())
                self.plans = {}

    def _select(self) -> None:
        plans = self._planned("tokens", self._segments)
        head = self._planned("logits", self._logit_segments)
        self.plans = {**plans, **head} if head else plans

    def _planned(self, which: str, segments: Segments) -> dict[str, Any]:
        if segments.plain:
            return {}
        key = (which, segments.key)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = (segments, self._plan(which, segments))
            if len(self._kept) > _KEPT_STEPS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return kept[1]

    def _plan(self, which: str, segments: Segments) -> dict[str, Any]:
        parts: dict[str, list[tuple[int, int, Any]]] = {}
        for segment in segments:
            if segment.adapter is None:
                continue
            for path, part in self._prepared(segment.adapter).items():
                if (path == self.head) == (which == "logits"):
                    parts.setdefault(path, []).append((segment.start, segment.stop, part))
        plans = {
            path: self.layers[path].plan(found, segments.rows) for path, found in parts.items()
        }
        read = [norm for path, plan in plans.items() for norm in self.layers[path].reads(plan)]
        return {**plans, **dict.fromkeys(map(kept_input, read), True)}

    def _prepared(self, adapter: LoweredAdapter) -> dict[str, Any]:
        """The adapter's deltas in the form its layers want them, made once."""
        held = self._terms.get(id(adapter))
        if held is None:
            missing = sorted(adapter.deltas.keys() - self.layers.keys())
            if missing:
                raise ValueError(
                    f"adapter {adapter.digest[:12]} has a delta for {missing[0]}, "
                    "which the operator does not wrap"
                )
            prepared = {p: self.layers[p].prepare(delta) for p, delta in adapter.deltas.items()}
            held = self._terms[id(adapter)] = (adapter, prepared)
        return held[1]


def kept_input(path: str) -> str:
    """The key among the plans that tells the norm at `path` to keep its input."""
    return f"{path}:input"


class AdaptedLayer(nn.Module):
    """A wrapped layer of the base: `inner` for the rows of no adapter, a plan for the others."""

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

    def wrong(self, delta: Delta) -> TypeError:
        return TypeError(f"{self.path} is no place for a {type(delta).__name__}")
