"""The waiting line: who is admitted next, fair among tenants by the tokens they were served, and
within a tenant among its accounts.

An account is whatever `key` makes of a sequence: its adapter. Virtual token counters decide (VTC:
Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv 2401.00588, algorithm 2): each
tenant, and each account of it, counts the tokens that were computed for it, an output token twice
as dear as one of a prompt. The tenant with the lowest counter is next, and of it the account with
the lowest: so a tenant with a thousand adapters gets what one with a single adapter gets. One that
comes back is lifted to the lowest counter that waits, so nobody saves up. Deficit round robin
(Shreedhar & Varghese 1995) would be cheaper, but it has to know what a packet costs before it sends
it, and nobody knows how long an answer becomes; a counter charges what was really served.

Two tenants, or two accounts of one tenant, that both wait all the time differ by at most
2 U + slack in what they were charged, whoever else comes and goes: U is the dearest prompt, or what
the running sequences of one can still use, whichever is more (theorem 4.4 there); `slack` is the
head start, in tokens, of accounts whose adapter is in a slot already.

VTC promises this to a fixed set of accounts. Where new ones keep coming, each enters at the lowest
counter, and one that is ahead of it could wait for ever. Hence the age cap: in each schedule, the
tenant that was served nothing for longest, if for longer than `age_cap` schedules, goes first with
one sequence, and within each tenant the account of which that is true. Within an account the order
is that of arrival, always.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from service.engine.sequence import Sequence

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2  # an output token needs a step of its own; the weights are the paper's
OLD = 0  # a rank: before all that are not

AccountKey = Callable[[Sequence], Hashable]


Standing = tuple[tuple[int, int], tuple[int, int], int]  # of the tenant; of the account; arrival


def by_adapter(sequence: Sequence) -> Hashable:
    """All names and placements of one digest are one account; the base is one too."""
    return sequence.adapter.digest if sequence.adapter else ""


@dataclass(slots=True)
class Account:
    """What one key was served, and who waits under it."""

    counter: int = 0
    waiting: dict[Sequence, int] = field(default_factory=dict)  # -> number of its arrival
    running: int = 0
    served: int = 0  # the schedule that last computed something for it, or saw it begin to wait

    @property
    def head(self) -> Sequence:
        return next(iter(self.waiting))


@dataclass(slots=True)
class Tenant:
    """What one tenant was served, and its accounts."""

    counter: int = 0
    served: int = 0  # as an account's
    accounts: dict[Hashable, Account] = field(default_factory=dict)
    last: Account | None = None  # whose last waiting sequence left last

    @property
    def waiting(self) -> bool:
        return any(account.waiting for account in self.accounts.values())

    @property
    def running(self) -> bool:
        return any(account.running for account in self.accounts.values())


class FairQueue:
    """Sequences that wait. Those that had to give their blocks back restart before all others."""

    def __init__(self, key: AccountKey = by_adapter, *, slack: int, age_cap: int) -> None:
        self.slack = slack
        self.age_cap = age_cap
        self._key = key
        self._tenants: dict[str, Tenant] = {}
        self._restarts: deque[Sequence] = deque()
        self._paid: dict[Sequence, int] = {}  # leading tokens that were charged, of who is inside
        self._arrivals = itertools.count()
        self._last: Tenant | None = None  # whose last waiting sequence left last
        self._now = 0

    def __len__(self) -> int:
        return len(self._restarts) + sum(len(account.waiting) for account in self._accounts())

    def __bool__(self) -> bool:
        return bool(self._restarts) or any(tenant.waiting for tenant in self._tenants.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Those that restart, then the others in order of arrival."""
        yield from self._restarts
        lines = (account.waiting.items() for account in self._accounts())
        for sequence, _ in heapq.merge(*lines, key=lambda item: item[1]):
            yield sequence

    def add(self, sequence: Sequence) -> None:
        """A new sequence arrives."""
        floor = _floor(self._tenants, self._last)
        tenant = self._tenants.setdefault(sequence.request.tenant, Tenant())
        if not tenant.waiting:
            tenant.counter = max(tenant.counter, floor)
            tenant.served = self._now
        floor = _floor(tenant.accounts, tenant.last)
        account = tenant.accounts.setdefault(self._key(sequence), Account())
        if not account.waiting:
            account.counter = max(account.counter, floor)
            account.served = self._now
        account.waiting[sequence] = next(self._arrivals)
        self._paid[sequence] = 0

    def admit(self, sequence: Sequence, cached: int) -> None:
        """It stops waiting; `cached` leading tokens need not be computed and are free.

        The rest of its prompt is charged at once, or a burst would be admitted before its account
        showed any of it.
        """
        self._unqueue(sequence).running += 1
        self._paid[sequence] = max(self._paid[sequence], min(cached, sequence.prompt_length))
        self.charge(sequence, sequence.prompt_length)

    def put_back(self, sequence: Sequence) -> None:
        """A running sequence has to start again. What it paid for once is not charged twice."""
        self._of(sequence)[1].running -= 1
        self._restarts.appendleft(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is over, whether it waited or ran."""
        if sequence in self._restarts:
            self._restarts.remove(sequence)
        elif sequence in (account := self._of(sequence)[1]).waiting:
            self._unqueue(sequence)
        else:
            account.running -= 1
        del self._paid[sequence]
        if not self._paid:  # nobody is inside: nobody is owed anything
            self._tenants.clear()
            self._last = None

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Its first `tokens` tokens are being computed now: count those not counted before."""
        paid, prompt = self._paid[sequence], sequence.prompt_length
        tenant, account = self._of(sequence)
        tenant.served = account.served = self._now
        if tokens > paid:
            ends, starts = min(tokens, prompt), min(paid, prompt)
            cost = PROMPT_WEIGHT * (ends - starts)
            cost += OUTPUT_WEIGHT * (max(tokens, prompt) - max(paid, prompt))
            tenant.counter += cost
            account.counter += cost
            self._paid[sequence] = tokens

    def tick(self) -> None:
        """The next schedule begins: the clock by which waiting is measured."""
        self._now += 1

    def candidates(self, resident: Callable[[Sequence], bool]) -> Iterator[Sequence]:
        """Who should be admitted, the next one first. The caller admits what is yielded, or passes
        it over by going on. `resident`: is what the sequence needs in its slot?"""
        yield from tuple(self._restarts)
        relieved: set[int] = set()  # tenants of whom an old account had its turn; the queue too

        def standing(tenant: Tenant, account: Account) -> Standing:
            arrival = next(iter(account.waiting.values()))
            ahead = self.slack if resident(account.head) else 0
            return (
                self._rank(tenant, tenant.counter, id(self) in relieved),
                self._rank(account, account.counter - ahead, id(tenant) in relieved),
                arrival,
            )

        line = [
            (standing(tenant, account), place, tenant, account, iter(tuple(account.waiting)))
            for place, (tenant, account) in enumerate(
                (tenant, account)
                for tenant in self._tenants.values()
                for account in tenant.accounts.values()
                if account.waiting
            )
        ]
        heapq.heapify(line)
        while line:
            found, place, tenant, account, untried = heapq.heappop(line)
            if found != (now := standing(tenant, account)):  # its tenant was served meanwhile
                heapq.heappush(line, (now, place, tenant, account, untried))
                continue
            for sequence in untried:
                yield sequence
                if sequence not in account.waiting:
                    if found[0][0] == OLD:
                        relieved.add(id(self))
                    if found[1][0] == OLD:
                        relieved.add(id(tenant))
                    if account.waiting:
                        now = standing(tenant, account)
                        heapq.heappush(line, (now, place, tenant, account, untried))
                    break

    def _rank(self, one: Tenant | Account, counter: int, relieved: bool) -> tuple[int, int]:
        """Who was served nothing for too long stands before all others, until one such had its
        turn in this schedule; then the counters decide."""
        if not relieved and one.served < self._now - self.age_cap:
            return (OLD, one.served)
        return (OLD + 1, counter)

    def _of(self, sequence: Sequence) -> tuple[Tenant, Account]:
        tenant = self._tenants[sequence.request.tenant]
        return tenant, tenant.accounts[self._key(sequence)]

    def _accounts(self) -> Iterator[Account]:
        for tenant in self._tenants.values():
            yield from tenant.accounts.values()

    def _unqueue(self, sequence: Sequence) -> Account:
        tenant, account = self._of(sequence)
        if sequence in account.waiting:
            del account.waiting[sequence]
            if not account.waiting:
                tenant.last = account
                if not tenant.waiting:
                    self._last = tenant
        else:
            self._restarts.remove(sequence)
        return account


Key = TypeVar("Key", bound=Hashable)
Counted = TypeVar("Counted", Tenant, Account)


def _floor(found: dict[Key, Counted], last: Counted | None) -> int:
    """The counter that a newcomer starts at. Idle ones below it need not be kept."""
    waiting = [one.counter for one in found.values() if one.waiting]
    floor = min(waiting) if waiting else last.counter if last else 0
    if len(found) > 2 * len(waiting) + 64:
        for key, one in list(found.items()):
            if not (one.waiting or one.running or one.counter > floor):
                del found[key]
    return floor
