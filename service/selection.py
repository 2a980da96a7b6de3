"""What a request's `adapter_id` comes to: versions, each pinned by its digest. No torch here."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.compose import FIELD, Part, Term, check_sum, check_terms, composed_digest, sum_of
from adapters.errors import InvalidAdapter
from adapters.manifest import DEFAULT_TENANT
from adapters.store import AdapterStore, alias_of
from adapters.traffic import choose
from service.engine.request import AdapterRef, full_name
from service.errors import InvalidRequest

MAX_REFERENCE = 200  # characters of `name@alias` or `sha256:<hex>`
REMEMBERED_SUMS = 8192


@dataclass(frozen=True, slots=True)
class Via:
    """The alias that chose a version."""

    name: str
    alias: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The versions that serve one request, with their weights; one with weight 1 is itself."""

    parts: tuple[Part, ...]  # in the order of their digests
    via: Via | None = None  # where one alias was named, and nothing else
    tenant: str = DEFAULT_TENANT  # who asked

    @property
    def single(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].weight == 1.0

    @property
    def digest(self) -> str:
        return self.parts[0].manifest.digest if self.single else composed_digest(self.parts)

    @property
    def ref(self) -> AdapterRef:
        """What the engine is asked for."""
        if self.single:
            return AdapterRef.of(self.parts[0].manifest, self.tenant)
        # No commas: in metrics names stand in a list.
        name = "+".join(part.manifest.name for part in self.parts)
        pairs = tuple((part.manifest.digest, part.weight) for part in self.parts)
        return AdapterRef(self.digest, full_name(name, self.tenant), parts=pairs)

    @property
    def template(self) -> str | None:
        """The chat template of the parts. Raises InvalidRequest where they bring several."""
        found = {part.manifest.template for part in self.parts}
        if len(found) > 1:
            raise InvalidRequest(
                "the parts bring different chat templates; send inputs as one text, or compose "
                "adapters of one template",
                FIELD,
            )
        return next(iter(found))


def select(
    terms: Sequence[Term],
    store: AdapterStore,
    *,
    client: str | None,
    max_rank: int,
    max_bytes: int,
) -> Selection:
    """Resolve each term to a version. Raises InvalidRequest, AdapterNotFound, StoreUnavailable.

    client     keeps a client at the version that an alias gave it
    max_rank, max_bytes   of the parts of a sum together
    """
    try:
        for term in terms:
            _check_length(term.reference)
        check_terms(terms)
        parts = sum_of([_part(term, store, client) for term in terms])
        if not parts:
            raise InvalidAdapter("the weights cancel each other, so no adapter is left", FIELD)
        found = Selection(parts, _via(terms), store.catalog.tenant)
        if not found.single:
            check_sum(parts, max_rank, max_bytes)
    except InvalidAdapter as error:
        raise InvalidRequest(error.reason, error.where) from error
    return found


def _part(term: Term, store: AdapterStore, client: str | None) -> Part:
    return Part(choose(store.arms(term.reference), term.reference, client).manifest, term.weight)


def _via(terms: Sequence[Term]) -> Via | None:
    named = alias_of(terms[0].reference) if len(terms) == 1 and terms[0].weight == 1.0 else None
    return Via(*named) if named else None


def _check_length(reference: str) -> None:
    if len(reference) > MAX_REFERENCE:
        raise InvalidAdapter(
            f"a reference of {len(reference)} characters; should have at most {MAX_REFERENCE}",
            FIELD,
        )


class Sums:
    """Which sums the engine may hold, so that they go when one of their parts is deleted.

    Thread-safe. A request's sum is noted before the engine hears of it.
    """

    def __init__(self, limit: int = REMEMBERED_SUMS) -> None:
        self._limit = limit
        self._parts: OrderedDict[str, frozenset[str]] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def note(self, ref: AdapterRef) -> None:
        """Remember the parts of a sum; anything else is left alone.

        Beyond the limit the oldest goes: nothing can name it once a part is deleted, and it leaves
        slots and caches in order of last use, as every adapter does.
        """
        if not ref.parts:
            return
        with self._lock:
            self._parts[ref.digest] = frozenset(digest for digest, _ in ref.parts)
            self._parts.move_to_end(ref.digest)
            if len(self._parts) > self._limit:
                self._parts.popitem(last=False)

    def of(self, digest: str) -> list[str]:
        """The sums that this adapter is a part of."""
        with self._lock:
            return [composed for composed, parts in self._parts.items() if digest in parts]
