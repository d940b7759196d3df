"""Calls that a worker has received and not answered, and the room of each tenant beside them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from isthmus.cloud.engine.requests import TooLate
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.secure.framing import wipe


@dataclass(slots=True)
class _Room:
    """A tenant's bytes in flight, and the calls that wait for room beside them."""

    nbytes: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # of the call that has waited longest
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class InFlight:
    """The calls that a worker has received and not answered. For the server's event loop alone.

    Args:
        fraction: this worker's fraction of a tenant's quotas, which may change.

    Attributes:
        calls: how many there are. May be asked from any thread.
    """

    def __init__(self, fraction: Callable[[Tenant], float]) -> None:
        self.calls = 0
        self._fraction = fraction
        self._idle = asyncio.Event()
        self._idle.set()
        self._rooms: dict[str, _Room] = {}  # by tenant

    async def all_answered(self) -> None:
        """Wait until there are none."""
        await self._idle.wait()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count a call until it is answered."""
        self.calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.calls -= 1
            if not self.calls:
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
        room, size = self._rooms.setdefault(tenant.name, _Room()), len(body)
        try:
            async with asyncio.timeout(patience), room.turn:
                while room.nbytes and room.nbytes + size > tenant.quota.max_inflight_bytes * self._fraction(tenant):
                    room.freed.clear()
                    await room.freed.wait()
                room.nbytes += size
        except BaseException as error:  # it is too late, or the edge is gone
            wipe(body)
            if isinstance(error, TimeoutError):
                raise TooLate from None
            raise
        try:
            yield
        finally:
            room.nbytes -= size
            room.freed.set()
