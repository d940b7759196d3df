"""What owners have in common: turns to compute, and places that are bounded. One who asks for much keeps nobody out."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Shares:
    """Places that all owners have in common, and beyond them a share of each owner's own, whatever others take.

    The shares of all owners who have come are half as many places as the common ones. For one event loop.

    Args:
        most: Common places.

    Attributes:
        taken: Places that each owner has.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken: Counter[str] = Counter()

    def take(self, owner: str, places: int = 1) -> bool:
        """Take places for an owner; returns whether they were there. Those that were are to be given back."""
        wanted = self.taken.setdefault(owner, 0) + places
        share = max(1, self.most // (2 * len(self.taken)))
        if wanted > share and self.taken.total() + places > self.most:
            return False
        self.taken[owner] = wanted
        return True

    def give_back(self, owner: str, places: int = 1) -> None:
        """Places that are free again."""
        self.taken[owner] -= places


class FairTurns:
    """At most `at_once` turns at a time; of the owners who wait, each gets the next one in turn. For one event loop.

    Args:
        at_once: Turns at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: OrderedDict[str, OrderedDict[asyncio.Future[None], None]] = OrderedDict()  # none without a wait

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it while the block runs."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(owner)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, owner: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, OrderedDict())[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass_on()  # it has come meanwhile
            elif turn in self._waiting.get(owner, ()):
                del self._waiting[owner][turn]
                if not self._waiting[owner]:
                    del self._waiting[owner]
            raise

    def _pass_on(self) -> None:
        """Give a turn that is over to the owner who has waited longest since its last one."""
        while self._waiting:
            owner, turns = next(iter(self._waiting.items()))
            turn, _ = turns.popitem(last=False)
            if turns:
                self._waiting.move_to_end(owner)
            else:
                del self._waiting[owner]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
