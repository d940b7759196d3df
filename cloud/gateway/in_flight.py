"""What is in flight: the calls that a worker has taken and not answered, and the bytes that each tenant has in them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

from isthmus.cloud.engine.requests import TooLate
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.secure.record import wipe


class InFlight:
    """The calls in flight of one worker. For the server's event loop alone, where nothing else is said.

    Args:
        part: the part of a tenant's quota that is this worker's to give, which may change.
    """

    def __init__(self, part: Callable[[Tenant], float]) -> None:
        self._part = part
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._bytes: Counter[str] = Counter()
        self._turns: list[asyncio.Future[None]] = []  # of calls that wait until fewer bytes are in flight
        self._queues: dict[str, list[object]] = {}  # calls of each tenant that want room, in their order

    @property
    def calls(self) -> int:
        """How many. May be asked from any thread."""
        return self._calls

    async def all_answered(self) -> None:
        """Wait until there are none."""
        await self._idle.wait()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count a call until it is answered."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def room_for(self, tenant: Tenant, body: bytearray, patience: float | None) -> AsyncIterator[None]:
        """Count a call's bytes against the tenant's, after the calls that they do not fit beside.

        A tenant's calls have room in the order in which they came, so that a small one does not keep a large one out.

        Args:
            tenant: whose call it is.
            body: its bytes, which are overwritten where the call is given up.
            patience: seconds that it may wait; None for as long as it takes.

        Raises:
            TooLate: it has waited for longer.
        """
        name, size, call = tenant.name, len(body), object()
        queue = self._queues.setdefault(name, [])
        queue.append(call)
        try:
            async with asyncio.timeout(patience):
                while queue[0] is not call or not self._fits(tenant, size):
                    turn = asyncio.get_running_loop().create_future()
                    self._turns.append(turn)
                    await turn
        except TimeoutError:
            wipe(body)
            raise TooLate from None
        except asyncio.CancelledError:  # the edge is gone
            wipe(body)
            raise
        finally:
            queue.remove(call)
            if not queue:
                del self._queues[name]
            self._wake()
        self._bytes[name] += size
        try:
            yield
        finally:
            self._bytes[name] -= size
            self._wake()

    def _fits(self, tenant: Tenant, size: int) -> bool:
        beside = self._bytes[tenant.name]
        return not beside or beside + size <= tenant.quota.max_inflight_bytes * self._part(tenant)

    def _wake(self) -> None:
        """Have those that wait look again."""
        turns, self._turns = self._turns, []
        for turn in turns:
            if not turn.done():
                turn.set_result(None)
