"""What owners have in common: turns to compute, and places that are bounded. One who asks for much keeps nobody out."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

KEPT_SECONDS = 600.0
"""So long after an owner has asked, a turn is kept for them: a chat goes on after minutes of reading."""


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

    The last free turn is kept for an owner who has none, where several owners have asked within `KEPT_SECONDS`: one who
    has asked lately does not wait for the end of a single other owner's long answers. Meanwhile that one has all turns
    but the last.

    Args:
        at_once: Turns at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._had: Counter[str] = Counter()
        self._asked_at: dict[str, float] = {}
        self._waiting: OrderedDict[str, OrderedDict[asyncio.Future[None], None]] = OrderedDict()  # none without a wait

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it while the block runs."""
        self._asked_at[owner] = asyncio.get_running_loop().time()
        if self._may_have(owner):
            self._take(owner)
        else:
            await self._wait(owner)
        try:
            yield
        finally:
            self._give_back(owner)

    def _may_have(self, owner: str) -> bool:
        latest = asyncio.get_running_loop().time() - KEPT_SECONDS
        is_kept = self._had[owner] and any(at > latest for other, at in self._asked_at.items() if other != owner)
        return self._free > (1 if is_kept else 0)

    def _take(self, owner: str) -> None:
        self._free -= 1
        self._had[owner] += 1

    async def _wait(self, owner: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, OrderedDict())[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._give_back(owner)  # it has come meanwhile
            elif turn in self._waiting.get(owner, ()):
                del self._waiting[owner][turn]
                if not self._waiting[owner]:
                    del self._waiting[owner]
            raise

    def _give_back(self, owner: str) -> None:
        """Give turns that are free to the owners who have waited longest since their last one."""
        self._free += 1
        self._had[owner] -= 1
        while (following := next(filter(self._may_have, self._waiting), None)) is not None:
            turns = self._waiting[following]
            turn, _ = turns.popitem(last=False)
            if turns:
                self._waiting.move_to_end(following)
            else:
                del self._waiting[following]
            if not turn.done():
                self._take(following)
                turn.set_result(None)
