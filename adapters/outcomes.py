"""What came of the requests that an alias sent to its versions: counts, times and feedback.

One row for each remembered request, so that feedback can find it, bounded in time and number; one
row of sums for each arm, which keeps what the others no longer do. Both change in one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from adapters.catalog import ATTEMPTS, Catalog
from adapters.errors import StoreUnavailable
from adapters.manifest import DEFAULT_TENANT
from adapters.tables import arms, served, totals

Ending = Literal["completed", "failed", "cancelled"]
Row = dict[str, Any]
ArmKey = tuple[str, str, str, int]  # tenant, name, alias, version


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that came through an alias."""

    request_id: str
    name: str
    alias: str
    version: int
    finished: float  # seconds since the epoch
    ending: Ending
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: float = 0.0  # seconds from arrival; of completed requests
    seconds: float = 0.0
    tenant: str = DEFAULT_TENANT  # who asked

    @property
    def arm(self) -> ArmKey:
        return self.tenant, self.name, self.alias, self.version


@dataclass(frozen=True, slots=True)
class Totals:
    """All requests of one arm together; sums of squares beside sums, for the variances."""

    version: int
    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_sum: float = 0.0
    first_token_squares: float = 0.0
    seconds_sum: float = 0.0
    seconds_squares: float = 0.0
    scored: int = 0
    binary: int = 0
    score_sum: float = 0.0
    score_squares: float = 0.0

    @property
    def completed(self) -> int:
        return self.requests - self.failed - self.cancelled


@dataclass(frozen=True, slots=True)
class Scored:
    """A request that feedback was given for."""

    request_id: str
    name: str
    alias: str
    version: int
    score: float
    replaced: float | None  # the score that it had before


class Outcomes:
    """The rows, in the catalog's database. Thread-safe; raises StoreUnavailable, StoreFull.

    Outcomes of all tenants are recorded; what is asked for is the tenant's of the catalog.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Remember requests, and add them to the sums of their arms: all of them or none.

        Those of an alias that is gone are left out, and those of another tenant's alias: what a
        tenant does with what is shared with it is not the other's to see.
        """
        for _ in range(ATTEMPTS):
            try:
                with self._catalog.writing() as connection:
                    _record(connection, outcomes)
                return
            except IntegrityError:  # another process made the arm's first row
                continue
        raise StoreUnavailable("the outcomes of requests could not be written")

    def score(self, request_id: str, score: float, comment: str | None) -> Scored | None:
        """Keep feedback, in place of what was given before; None where the request is not known."""
        with self._catalog.writing() as connection:
            query = sa.select(served).where(
                served.c.tenant == self._catalog.tenant, served.c.request_id == request_id
            )
            row = connection.execute(query.with_for_update()).first()
            if row is None:
                return None
            mine = sa.update(served).where(served.c.request_id == request_id)
            connection.execute(mine.values(score=score, comment=comment))
            change = _scores(score, 1)
            if row.score is not None:
                _add(change, _scores(row.score, -1))
            _change(connection, (row.tenant, row.name, row.alias, row.version), change)
        return Scored(request_id, row.name, row.alias, row.version, score, row.score)

    def totals(self, name: str, alias: str) -> dict[int, Totals]:
        """Version -> what its requests came to, through this alias."""
        columns = [totals.c[field.name] for field in fields(Totals)]
        query = sa.select(*columns).where(
            totals.c.tenant == self._catalog.tenant,
            totals.c.name == name,
            totals.c.alias == alias,
        )
        with self._catalog.reading() as connection:
            return {row.version: Totals(*row) for row in connection.execute(query)}

    def comments(self, name: str, alias: str, newest: int) -> list[tuple[int, float, str]]:
        """(version, score, comment), the newest requests first."""
        query = (
            sa.select(served.c.version, served.c.score, served.c.comment)
            .where(served.c.tenant == self._catalog.tenant, served.c.name == name)
            .where(served.c.alias == alias, served.c.comment.is_not(None))
            .order_by(served.c.finished.desc())
            .limit(newest)
        )
        with self._catalog.reading() as connection:
            return [(row.version, row.score, row.comment) for row in connection.execute(query)]

    def forget(self, before: float, keep: int) -> int:
        """Forget requests that ended before a time, and all but the newest `keep`; how many.

        The sums stay.
        """
        last = sa.select(served.c.finished).order_by(served.c.finished.desc())
        with self._catalog.writing() as connection:
            full = connection.execute(last.offset(keep).limit(1)).scalar()
            bound = served.c.finished < before
            if full is not None:
                bound = sa.or_(bound, served.c.finished <= full)
            return connection.execute(sa.delete(served).where(bound)).rowcount


def _record(connection: sa.Connection, outcomes: Sequence[Outcome]) -> None:
    rows = connection.execute(sa.select(arms.c.tenant, arms.c.name, arms.c.alias).distinct())
    living = {tuple(row) for row in rows}
    kept = [outcome for outcome in outcomes if outcome.arm[:3] in living]
    if not kept:
        return
    connection.execute(sa.insert(served), [_row(outcome) for outcome in kept])
    sums: dict[ArmKey, Row] = {}
    for outcome in kept:
        _add(sums.setdefault(outcome.arm, {}), _share(outcome))
    for arm, change in sums.items():
        _change(connection, arm, change)


def _row(outcome: Outcome) -> Row:
    names = ("request_id", "tenant", "name", "alias", "version", "finished")
    return {name: getattr(outcome, name) for name in names}


def _share(outcome: Outcome) -> Row:
    """What one request adds to the sums of its arm."""
    share: Row = {
        "requests": 1,
        "prompt_tokens": outcome.prompt_tokens,
        "generated_tokens": outcome.generated_tokens,
    }
    if outcome.ending != "completed":
        return share | {outcome.ending: 1}
    return share | {
        "first_token_sum": outcome.first_token,
        "first_token_squares": outcome.first_token**2,
        "seconds_sum": outcome.seconds,
        "seconds_squares": outcome.seconds**2,
    }


def _scores(score: float, sign: int) -> Row:
    return {
        "scored": sign,
        "binary": sign * (score in (0.0, 1.0)),
        "score_sum": sign * score,
        "score_squares": sign * score**2,
    }


def _add(sums: Row, share: Mapping[str, Any]) -> None:
    for name, value in share.items():
        sums[name] = sums.get(name, 0) + value


def _change(connection: sa.Connection, arm: ArmKey, change: Row) -> None:
    """Add to the sums of an arm; its first row is made where there is none."""
    own = dict(zip(("tenant", "name", "alias", "version"), arm, strict=True))
    mine = [totals.c[column] == value for column, value in own.items()]
    added = {column: totals.c[column] + value for column, value in change.items()}
    if connection.execute(sa.update(totals).where(*mine).values(**added)).rowcount == 0:
        zero = {field.name: field.default for field in fields(Totals) if field.name != "version"}
        connection.execute(sa.insert(totals).values(**own, **{**zero, **change}))
