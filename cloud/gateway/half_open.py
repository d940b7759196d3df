"""gRPC calls whose peer is not authenticated yet: how many there may be, and which one is ended for a new one.

They are handshakes and health checks. Each has a place for a limited time. Where there is no place for a new call, one
of those that have a place is ended:

    1. A host that has as many as a host may have loses its own oldest one.
    2. Silent peers, which have sent nothing valid, lose theirs first: a stream costs a stranger nothing, a valid hello
       costs a little. Where fewer than half of all are silent, any peer may lose its place, so that peers that have
       sent a hello cannot keep all places from newcomers.
    3. Among these, the host with the most loses its oldest one. So a flood from one address displaces only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import IPv6Address
from typing import Any
from urllib.parse import unquote

from isthmus.cloud.bounds import Bounds


class HalfOpen:
    """The places of calls that are not authenticated. For one event loop.

    Args:
        bounds: how many places there are, and for how long a call has one.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        # In the order in which they began: the host of each, and whether it has sent something valid.
        self._waiting: dict[asyncio.Timeout, tuple[str, Callable[[], bool]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def place(self, host: str, greeted: Callable[[], bool] = lambda: False) -> AsyncIterator[None]:
        """Hold a place for as long as the context lasts; another call may be ended for it.

        Args:
            host: whose call it is, as `host_of` gives it.
            greeted: whether the peer has sent something valid by now.

        Raises:
            TimeoutError: the time is over, or the place was given to another call.
        """
        async with asyncio.timeout(self._bounds.handshake_seconds) as limit:
            self._make_room(host)  # before anything is awaited: others come in meanwhile
            self._waiting[limit] = host, greeted
            try:
                yield
            finally:
                self._waiting.pop(limit, None)

    def _make_room(self, host: str) -> None:
        """End a call if there is no place for a new one of `host`."""
        waiting = list(self._waiting.items())
        own = [each for each in waiting if each[1][0] == host]
        if len(own) >= self._bounds.max_half_open_per_host:
            among = own
        elif len(waiting) >= self._bounds.max_half_open:
            among = waiting
        else:
            return
        limit, _ = among[to_end([(peer, greeted()) for _, (peer, greeted) in among])]
        del self._waiting[limit]
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())


async def accept_call(context: Any) -> None:
    """Tell a peer that its call was accepted, by sending the initial metadata.

    Sending is finished also where the call loses its place meanwhile: metadata whose sending was broken off would be
    sent again by gRPC with the status, which fails, and the call would never end.

    Args:
        context: the call's grpc.aio context.
    """
    sending = asyncio.ensure_future(context.send_initial_metadata(()))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await sending
        raise


def to_end(waiting: Sequence[tuple[str, bool]]) -> int:
    """The index of the call that is ended for a new one.

    Args:
        waiting: the host of each call, and whether it has sent something valid, in the order in which they began; not
            empty.
    """
    silent = [index for index, (_, greeted) in enumerate(waiting) if not greeted]
    among = silent if 2 * len(silent) >= len(waiting) else range(len(waiting))
    held = Counter(peer for peer, _ in waiting)
    return max(among, key=lambda index: held[waiting[index][0]])  # of equals the first, so the oldest


def host_of(peer: str) -> str:
    """The host of a connection, from gRPC's name of the peer, such as `ipv4:10.0.0.1:5000`.

    It is the address without the port. Of an IPv6 address it is the first 64 bits, as one host has all the others.
    """
    host = unquote(peer).rpartition(":")[0]
    if not host.startswith("ipv6:["):
        return host
    return f"ipv6:{IPv6Address(host[len('ipv6:[') : -1]).packed[:8].hex()}"
