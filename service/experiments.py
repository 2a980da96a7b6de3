"""Experiments: what each version behind an alias did with the requests that it got.

A request through an alias is noted when it ends and written soon after, off every request's road;
feedback finds it by its id. No torch here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from adapters.errors import AdapterError, AdapterNotFound
from adapters.intervals import Interval, Sample, mean, mean_difference, rate, rate_difference
from adapters.manifest import DEFAULT_TENANT, AdapterManifest
from adapters.outcomes import Ending, Outcome, Outcomes, Scored, Totals
from adapters.store import AdapterStore
from service.engine.request import Event, Finished
from service.engine.stream import EventStream
from service.selection import Via

log = logging.getLogger(__name__)

REMEMBERED_SECONDS = 7 * 24 * 3600.0
REMEMBERED_REQUESTS = 100_000
WRITE_SECONDS = 0.5
FORGET_SECONDS = 60.0
UNWRITTEN = 10_000  # outcomes that wait for a database that fails
COMMENTS = 20


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm, with the interval of each mean; None where nothing has been counted."""

    version: int
    digest: str  # empty where the version was deleted since
    weight: float  # 0 where the alias does not point to it any more
    totals: Totals
    feedback: Interval | None
    first_token: Interval | None
    seconds: Interval | None
    completed: Interval | None  # the share of requests that ended well


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm's means less the control's."""

    version: int
    control: int
    feedback: Interval | None
    first_token: Interval | None
    seconds: Interval | None


@dataclass(frozen=True, slots=True)
class Comment:
    version: int
    score: float
    text: str


@dataclass(frozen=True, slots=True)
class Experiment:
    """The A/B table of one alias; the control is the arm with the largest share."""

    name: str
    alias: str
    arms: tuple[ArmFigures, ...]
    differences: tuple[Difference, ...]
    comments: tuple[Comment, ...]


class Experiments:
    """Outcomes in, tables out. Thread-safe; `close` writes what has not been written."""

    def __init__(
        self,
        store: AdapterStore,
        *,
        remembered_seconds: float = REMEMBERED_SECONDS,
        remembered_requests: int = REMEMBERED_REQUESTS,
    ) -> None:
        self._store = store
        self._rows: Outcomes = store.outcomes
        self._bounds = (remembered_seconds, remembered_requests)
        self._unwritten: list[Outcome] = []
        self._listing = threading.Lock()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._swept = 0.0
        self._thread = threading.Thread(target=self._main, name="nibble-outcomes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join()
        self._write()

    def record(self, outcome: Outcome) -> None:
        """Note one request that has ended; returns at once."""
        with self._listing:
            self._unwritten.append(outcome)
        self._wake.set()

    def score(
        self, request_id: str, score: float, comment: str | None, tenant: str = DEFAULT_TENANT
    ) -> Scored | None:
        """Keep feedback for a request of this tenant, in place of earlier; None where it is not
        known (any more).

        Raises StoreUnavailable, StoreFull.
        """
        self.flush()
        return self._store.of(tenant).outcomes.score(request_id, score, comment)

    def flush(self) -> None:
        """Write what has ended until now. Raises StoreUnavailable, StoreFull."""
        with self._writing:
            with self._listing:
                batch, self._unwritten = self._unwritten, []
            try:
                if batch:
                    self._rows.record(batch)
            except AdapterError:
                with self._listing:
                    self._unwritten = [*batch, *self._unwritten][-UNWRITTEN:]
                raise

    def forget(self) -> int:
        """Forget the requests that are too old or too many; how many."""
        seconds, number = self._bounds
        return self._rows.forget(time.time() - seconds, number)

    def table(self, name: str, alias: str, tenant: str = DEFAULT_TENANT) -> Experiment:
        """Raises AdapterNotFound, where this tenant has no such alias; StoreUnavailable."""
        self.flush()
        store = self._store.of(tenant)
        arms = store.arms(f"{name}@{alias}")
        totals = store.outcomes.totals(name, alias)
        weights = {arm.manifest.version: arm.weight for arm in arms}
        # Those that the alias points to first, the largest share first; then those of before.
        versions = [*weights, *sorted(version for version in totals if version not in weights)]
        digests = _digests(store, name)
        figures = tuple(
            _figures(v, digests.get(v, ""), weights.get(v, 0.0), totals.get(v, Totals(v)))
            for v in versions
        )
        differences = tuple(_difference(one.totals, figures[0].totals) for one in figures[1:])
        comments = tuple(Comment(*row) for row in store.outcomes.comments(name, alias, COMMENTS))
        return Experiment(name, alias, figures, differences, comments)

    def _main(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._wake.clear()
            self._write()
            self._closed.wait(WRITE_SECONDS)  # one transaction for all that end meanwhile

    def _write(self) -> None:
        try:
            self.flush()
            if time.monotonic() - self._swept > FORGET_SECONDS:
                self._swept = time.monotonic()
                self.forget()
        except AdapterError as error:  # they stay, and are tried again with the next
            log.warning("outcomes of requests could not be written: %s", error)


class Watched:
    """An EventStream that notes what came of the request, once, when its last sequence has ended
    or when nobody wants it any more."""

    def __init__(
        self,
        stream: EventStream,
        sequences: int,
        outcome: Callable[[Ending, tuple[Finished, ...]], None],
    ) -> None:
        self._stream = stream
        self._sequences = sequences
        self._outcome: Callable[[Ending, tuple[Finished, ...]], None] | None = outcome
        self._ends: list[Finished] = []

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for event in self._stream:
            if isinstance(event, Finished):
                self._ends.append(event)
                if len(self._ends) == self._sequences:
                    self._note()  # before the client can know it and send feedback
            yield event

    def cancel(self) -> None:
        self._stream.cancel()
        self._note()

    def _note(self) -> None:
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            return
        reasons = {end.reason for end in self._ends}
        ending: Ending = "completed"
        if "error" in reasons:
            ending = "failed"
        elif len(self._ends) < self._sequences or "cancelled" in reasons:
            ending = "cancelled"
        outcome(ending, tuple(self._ends))


def outcome_of(
    request_id: str,
    via: Via,
    version: int,
    ending: Ending,
    ends: tuple[Finished, ...],
    tenant: str = DEFAULT_TENANT,
) -> Outcome:
    """Times by the engine's clock: from the request's arrival there, loading its adapter included.
    Of several sequences the first token of the first, and the end of the last."""
    first = min((end.queue_seconds + end.prefill_seconds for end in ends), default=0.0)
    last = max(
        (end.queue_seconds + end.prefill_seconds + end.decode_seconds for end in ends), default=0.0
    )
    return Outcome(
        request_id=request_id,
        name=via.name,
        alias=via.alias,
        version=version,
        finished=time.time(),
        ending=ending,
        prompt_tokens=max((end.prompt_tokens for end in ends), default=0),
        generated_tokens=sum(end.generated_tokens for end in ends),
        first_token=first,
        seconds=last,
        tenant=tenant,
    )


def _digests(store: AdapterStore, name: str) -> Mapping[int, str]:
    try:
        found: tuple[AdapterManifest, ...] = store.describe(name).versions
    except AdapterNotFound:
        return {}
    return {manifest.version: manifest.digest for manifest in found}


def _figures(version: int, digest: str, weight: float, totals: Totals) -> ArmFigures:
    return ArmFigures(
        version=version,
        digest=digest,
        weight=weight,
        totals=totals,
        feedback=rate(totals.score_sum, totals.scored)
        if _is_rate(totals)
        else mean(_scores(totals)),
        first_token=mean(_first_tokens(totals)),
        seconds=mean(_seconds(totals)),
        # What its client broke off says nothing of the adapter.
        completed=rate(totals.completed, totals.completed + totals.failed),
    )


def _difference(arm: Totals, control: Totals) -> Difference:
    if _is_rate(arm) and _is_rate(control):
        feedback = rate_difference(arm.score_sum, arm.scored, control.score_sum, control.scored)
    else:
        feedback = mean_difference(_scores(arm), _scores(control))
    return Difference(
        version=arm.version,
        control=control.version,
        feedback=feedback,
        first_token=mean_difference(_first_tokens(arm), _first_tokens(control)),
        seconds=mean_difference(_seconds(arm), _seconds(control)),
    )


def _is_rate(totals: Totals) -> bool:
    """Every score was yes or no."""
    return totals.binary == totals.scored


def _scores(totals: Totals) -> Sample:
    return Sample(totals.scored, totals.score_sum, totals.score_squares)


def _first_tokens(totals: Totals) -> Sample:
    return Sample(totals.completed, totals.first_token_sum, totals.first_token_squares)


def _seconds(totals: Totals) -> Sample:
    return Sample(totals.completed, totals.seconds_sum, totals.seconds_squares)
