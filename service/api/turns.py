"""Turns at what only some can have at once: a tenant after the other."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable


class Turns(OrderedDict[str, deque[asyncio.Future[None]]]):
    """Who waits, by tenant: whose turn it is first. One event loop only."""

    @property
    def waiting(self) -> int:
        """Of all tenants."""
        return sum(map(len, self.values()))

    async def wait(self, tenant: str, unused: Callable[[], None]) -> None:
        """Until `give` comes to whoever asks. `unused` is called for a turn that was given to who
        had just gone."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                unused()
            else:
                self._leave(tenant, turn)
            raise

    def give(self, tenant: str) -> None:
        """To the first of a tenant's; its others come after the other tenants."""
        turn = self[tenant][0]
        self._leave(tenant, turn)
        if tenant in self:
            self.move_to_end(tenant)
        turn.set_result(None)

    def _leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        self[tenant].remove(turn)
        if not self[tenant]:
            del self[tenant]
