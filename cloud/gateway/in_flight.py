"""Calls in flight, which a worker has received and not answered, and the bytes that each tenant has in them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

from isthmus.cloud.engine.requests import TooLate
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.secure.framing import wipe


class InFlight:
    """The calls in flight of one worker. For the server's event loop alone, where nothing else is said.

    Args:
        part: this worker's part of a tenant's quota, which may change.
    """

    def __init__(self, part: Callable[[Tenant], float]) -> None:
        self._part = part
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._bytes: Counter[str] = Counter()
        self._waiting: list[asyncio.Future[None]] = []  # done when a call that waits should try again
        self._queues: dict[str, list[object]] = {}  # by tenant: the calls that wait, in the order in which they came

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
        """Count a call's bytes against its tenant's quota; wait until they fit.

        A tenant's calls get room in the order in which they came, so that small ones do not keep a large one waiting.
        A call that is larger than the quota gets room when it is alone.

        Args:
            tenant: whose call it is.
            body: its bytes, which are overwritten where the call is given up.
            patience: seconds that it may wait; None for no limit.

        Raises:
            TooLate: there was no room within `patience`.
        """
        name, size, call = tenant.name, len(body), object()
        queue = self._queues.setdefault(name, [])
        queue.append(call)
        try:
            async with asyncio.timeout(patience):
                while queue[0] is not call or not self._fits(tenant, size):
                    retry = asyncio.get_running_loop().create_future()
                    self._waiting.append(retry)
                    await retry
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
        """Have the calls that wait try again."""
        waiting, self._waiting = self._waiting, []
        for retry in waiting:
            if not retry.done():
                retry.set_result(None)
