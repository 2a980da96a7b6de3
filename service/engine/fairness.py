"""The waiting line: who is admitted next, fair among accounts by the tokens they were served.

An account is whatever `key` makes of a sequence: its adapter today; a tenant, or a pair of both,
is only another function. Virtual token counters decide (VTC: Sheng et al. 2024, "Fairness in
Serving Large Language Models", arXiv 2401.00588, algorithm 2): each account counts the tokens that
were computed for it, an output token twice as dear as one of a prompt, and the account with the
lowest counter is next. One that comes back is lifted to the lowest counter that waits, so nobody
saves up. Deficit round robin (Shreedhar & Varghese 1995) would be cheaper, but it has to know what
a packet costs before it sends it, and nobody knows how long an answer becomes; a counter charges
what was really served.

Two accounts that both wait all the time differ by at most 2 U + slack in what they were charged,
whoever else comes and goes: U is the dearest prompt, or what one account's running sequences can
still use, whichever is more (theorem 4.4 there); `slack` is the head start, in tokens, of accounts
whose adapter is in a slot already.

VTC promises this to a fixed set of accounts. Where new ones keep coming, each enters at the lowest
counter, and one that is ahead of it could wait for ever. Hence the age cap: in each schedule, the
account that was served nothing for longest, if for longer than `age_cap` schedules, goes first
with one sequence. Within an account the order is that of arrival, always.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from service.engine.sequence import Sequence

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2  # an output token needs a step of its own; the weights are the paper's

AccountKey = Callable[[Sequence], Hashable]


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


class FairQueue:
    """Sequences that wait. Those that had to give their blocks back restart before all others."""

    def __init__(self, key: AccountKey = by_adapter, *, slack: int, age_cap: int) -> None:
        self.slack = slack
        self.age_cap = age_cap
        self._key = key
        self._accounts: dict[Hashable, Account] = {}
        self._restarts: deque[Sequence] = deque()
        self._paid: dict[Sequence, int] = {}  # leading tokens that were charged, of who is inside
        self._arrivals = itertools.count()
        self._last: Account | None = None  # whose last waiting sequence left last
        self._now = 0

    def __len__(self) -> int:
        return len(self._restarts) + sum(len(a.waiting) for a in self._accounts.values())

    def __bool__(self) -> bool:
        return bool(self._restarts) or any(a.waiting for a in self._accounts.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Those that restart, then the others in order of arrival."""
        yield from self._restarts
        lines = (account.waiting.items() for account in self._accounts.values())
        for sequence, _ in heapq.merge(*lines, key=lambda item: item[1]):
            yield sequence

    def add(self, sequence: Sequence) -> None:
        """A new sequence arrives."""
        floor = self._floor()
        account = self._accounts.setdefault(self._key(sequence), Account())
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
        self._accounts[self._key(sequence)].running -= 1
        self._restarts.appendleft(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is over, whether it waited or ran."""
        if sequence in self._restarts:
            self._restarts.remove(sequence)
        elif sequence in (account := self._accounts[self._key(sequence)]).waiting:
            self._unqueue(sequence)
        else:
            account.running -= 1
        del self._paid[sequence]
        if not self._paid:  # nobody is inside: nobody is owed anything
            self._accounts.clear()
            self._last = None

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Its first `tokens` tokens are being computed now: count those not counted before."""
        paid, prompt = self._paid[sequence], sequence.prompt_length
        account = self._accounts[self._key(sequence)]
        account.served = self._now
        if tokens > paid:
            ends, starts = min(tokens, prompt), min(paid, prompt)
            account.counter += PROMPT_WEIGHT * (ends - starts)
            account.counter += OUTPUT_WEIGHT * (max(tokens, prompt) - max(paid, prompt))
            self._paid[sequence] = tokens

    def tick(self) -> None:
        """The next schedule begins: the clock by which waiting is measured."""
        self._now += 1

    def candidates(self, resident: Callable[[Sequence], bool]) -> Iterator[Sequence]:
        """Who should be admitted, the next one first. The caller admits what is yielded, or passes
        it over by going on. `resident`: is what the sequence needs in its slot?"""
        yield from tuple(self._restarts)
        yield from self._oldest()
        line = [
            (self._standing(account, resident), arrival, account)
            for account in self._accounts.values()
            if (arrival := next(iter(account.waiting.values()), None)) is not None
        ]
        heapq.heapify(line)
        untried: dict[int, Iterator[Sequence]] = {}  # by arrival of the account's first head
        while line:
            _, place, account = heapq.heappop(line)
            if place not in untried:
                untried[place] = iter(tuple(account.waiting))
            for sequence in untried[place]:
                if sequence not in account.waiting:
                    continue  # the oldest, admitted above
                yield sequence
                if sequence not in account.waiting:
                    if account.waiting:
                        standing = self._standing(account, resident)
                        heapq.heappush(line, (standing, place, account))
                    break

    def _oldest(self) -> Iterator[Sequence]:
        """Sequences of accounts that were served nothing for too long, until one is admitted."""
        limit = self._now - self.age_cap
        old = [a for a in self._accounts.values() if a.waiting and a.served < limit]
        for account in sorted(old, key=lambda a: a.served):
            head = account.head
            yield head
            if head not in account.waiting:
                return

    def _standing(self, account: Account, resident: Callable[[Sequence], bool]) -> int:
        return account.counter - (self.slack if resident(account.head) else 0)

    def _unqueue(self, sequence: Sequence) -> Account:
        account = self._accounts[self._key(sequence)]
        if sequence in account.waiting:
            del account.waiting[sequence]
            if not account.waiting:
                self._last = account
        else:
            self._restarts.remove(sequence)
        return account

    def _floor(self) -> int:
        """The counter that a newcomer starts at. Idle accounts below it need not be kept."""
        waiting = [account.counter for account in self._accounts.values() if account.waiting]
        floor = min(waiting) if waiting else self._last.counter if self._last else 0
        if len(self._accounts) > 2 * len(waiting) + 64:
            self._accounts = {
                key: account
                for key, account in self._accounts.items()
                if account.waiting or account.running or account.counter > floor
            }
        return floor
