"""Calls whose peer has not been authenticated yet: how many there may be, and which one gives way to another.

They are handshakes and questions about health. Each has a place for a limited time.

Rules
    1. Where one host has as many as it may have, its own give way, the oldest first.
    2. Who has said nothing valid gives way first: a stream costs a stranger nothing, a hello a little.
    3. They never have less than half of the places, so that those who go further do not keep newcomers from speaking:
       where they have less, anybody may have to give way.
    4. The peer with the most gives way, with its oldest. So a flood from one address displaces itself alone.
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
    """The places of those that have not been authenticated. For one event loop.

    Args:
        bounds: how many there are, and for how long.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        # In the order in which they began, with the host that each is from and whether it has said something valid.
        self._waiting: dict[asyncio.Timeout, tuple[str, Callable[[], bool]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def place(self, host: str, greeted: Callable[[], bool] = lambda: False) -> AsyncIterator[None]:
        """Have a place for as long as the context lasts; another one may have to give way.

        Args:
            host: who takes it, as `host_of` says it.
            greeted: whether the peer has said something valid by now.

        Raises:
            TimeoutError: the time is over, or the place was given to another.
        """
        async with asyncio.timeout(self._bounds.handshake_seconds) as limit:
            self._make_room(host)  # before anything is awaited: others come in meanwhile
            self._waiting[limit] = host, greeted
            try:
                yield
            finally:
                self._waiting.pop(limit, None)

    def _make_room(self, host: str) -> None:
        """For one that begins."""
        waiting = list(self._waiting.items())
        own = [each for each in waiting if each[1][0] == host]
        if len(own) >= self._bounds.max_half_open_per_host:
            among = own
        elif len(waiting) >= self._bounds.max_half_open:
            among = waiting
        else:
            return
        limit, _ = among[gives_way([(peer, greeted()) for _, (peer, greeted) in among])]
        del self._waiting[limit]
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())


async def tell_taken(context: Any) -> None:
    """Tell a peer that its call is taken, by sending the initial metadata.

    That is finished also where the place is lost meanwhile. Metadata whose sending was broken off is sent again with
    the status by gRPC; that fails, and the call would never end.

    Args:
        context: the call's grpc.aio context.
    """
    sending = asyncio.ensure_future(context.send_initial_metadata(()))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await sending
        raise


def gives_way(waiting: Sequence[tuple[str, bool]]) -> int:
    """The index of the handshake that gives way.

    Args:
        waiting: of each, in the order in which they began, whose it is and whether it has had a valid hello; not empty.
    """
    silent = [index for index, (_, greeted) in enumerate(waiting) if not greeted]
    among = silent if 2 * len(silent) >= len(waiting) else range(len(waiting))
    held = Counter(peer for peer, _ in waiting)
    return max(among, key=lambda index: held[waiting[index][0]])  # of equals the first, so the oldest


def host_of(peer: str) -> str:
    """Whose connection it is, from what gRPC calls the peer, such as `ipv4:10.0.0.1:5000`.

    The address without the port. Of an IPv6 address the first 64 bits, as one host has all the others.
    """
    host = unquote(peer).rpartition(":")[0]
    if not host.startswith("ipv6:["):
        return host
    return f"ipv6:{IPv6Address(host[len('ipv6:[') : -1]).packed[:8].hex()}"
