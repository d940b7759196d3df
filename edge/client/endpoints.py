"""The addresses of a cloud's workers: which one is used at present, and which one next.

A cloud tells an edge where its workers listen. Any of them serves any session, so the edge goes on at another one when
its own is gone. All workers show the same root key, the one that the edge has pinned: a wrong list leads nowhere.

On a cloud of several machines a worker keeps its port and changes its machine. So where none of the addresses answers,
the edge tries each of their ports on each of their machines.

An edge that has had no session yet knows the places of its connection string alone, and tries each of them before it
gives up: one may show a certificate that has expired, or drain, and the next one serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from isthmus.rpc.transport import Stream, Transport

MOST_TRIED = 64
"""Addresses that are tried in turn, at most. A list can be longer, and all of its addresses are tried then."""


class Endpoints:
    """Opens streams to the worker that is chosen at present.

    Args:
        first: the transport to where the edge was told to connect. Once closed, it connects anew for its next stream.
        address: that address, `host:port`; it stays in the list, whatever list the cloud gives.
        reach: makes a transport to another address; None stays with the first one.
        further: other addresses where the edge was told to connect; they stay in the list as well.

    Attributes:
        settled: whether the worker is not to send the edge elsewhere: it was sent there, or where it was sent cannot be
            reached.
    """

    def __init__(
        self,
        first: Transport,
        address: str,
        reach: Callable[[str], Transport] | None = None,
        further: Sequence[str] = (),
    ) -> None:
        self._address = self._at = address
        self._told = (address, *further)
        self._known: tuple[str, ...] = self._told
        # Of a connection string that names several: its places, and those that are still to be tried, in its order.
        self._places = dict.fromkeys(self._told) if further and reach is not None else {}
        self._untried = dict(self._places)
        self._first = self._transport = first
        self._reach = reach
        self.settled = False

    async def open(self) -> Stream:
        """Open a new stream. Raises ConnectionLostError where that is not possible at present."""
        self._untried.pop(self._at, None)
        return await self._transport.open()

    async def close(self) -> None:
        """Release what the transports hold."""
        await self._transport.close()
        await self._first.close()

    def learn(self, addresses: Sequence[str]) -> None:
        """Take a cloud's list of workers in the place of the one before."""
        self._known = tuple(dict.fromkeys((*addresses, *self._told)))

    async def send_to(self, address: str) -> None:
        """Go where the worker says. An edge that cannot go anywhere else settles where it is."""
        self.settled = True
        if self._at in self._places:  # it has not refused, and may take the edge where the other does not
            self._untried[self._at] = None
        await self._go(address)

    def attached(self) -> None:
        """The worker has taken the session; a later one may be sent elsewhere again."""
        self.settled = False

    async def failed(self) -> None:
        """The worker cannot be reached, or takes no session: choose the next one of the list.

        The connection is given up even where that is the same address. Behind a load balancer, which several workers
        share, a new connection can lead to another worker, and the old one always leads to the same.
        """
        await self._transport.close()
        tried = self._to_try()
        place = tried.index(self._at) if self._at in tried else -1
        await self._go(tried[(place + 1) % len(tried)])

    async def go_on(self) -> bool:
        """Go to a place of the connection string that has not been tried yet; False where there is none.

        There is none in a connection string of one place, or where the edge cannot go anywhere else.
        """
        place = next(iter(self._untried), None)
        if place is None:
            return False
        await self._go(place)
        return True

    def _to_try(self) -> list[str]:
        """The known addresses, then each of their ports on each of their machines."""
        parts = [address.rpartition(":") for address in self._known]
        hosts, ports = (dict.fromkeys(part[place] for part in parts) for place in (0, 2))
        crossed = (f"{host}:{port}" for port in ports for host in hosts)
        found = dict.fromkeys((*self._known, *islice(crossed, MOST_TRIED)))
        return list(found)[: max(MOST_TRIED, len(self._known))]

    async def _go(self, address: str) -> None:
        if address == self._at or self._reach is None:
            return
        if self._transport is not self._first:
            await self._transport.close()
        self._transport = self._first if address == self._address else self._reach(address)
        self._at = address
