"""Closes connections whose peer does not take the end of a call. gRPC itself would wait for ever.

A peer that opens no HTTP/2 window for what a call has sent keeps that call and its memory alive after its handler has
returned: the status goes out behind the data, and grpc.aio has no way to reset a stream. So the connection's socket is
shut down, as if the network had failed, and gRPC cleans up after it. All calls of that connection end; an honest edge
has one connection for each of its sessions, and opens another.

Connections without a call are closed in the same way where there are so many that others find no room.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from isthmus.cloud.telemetry.logs import log

OWN_FILES = Path("/dev/fd")
"""Where Linux, macOS and the BSDs list the open files of the process that asks."""


class HangUp:
    """Closes the connections of calls that do not end. For one event loop.

    Args:
        seconds: how long a call may take to end, once its handler has returned.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: set[str] = set()

    def when_lingering(self, context: Any, in_transit: float = 0.0) -> None:
        """Close a call's connection unless the call ends soon; to be called as its handler returns.

        Args:
            context: the call's grpc.aio context.
            in_transit: further seconds that a slow network may take for what was sent.
        """
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._seconds + in_transit, self._lingers, context.peer())
        context.add_done_callback(lambda _: timer.cancel())

    async def abort(self, context: Any, code: grpc.StatusCode, text: str) -> None:
        """End a call with a status, and its connection where the peer does not take it.

        Args:
            context: the call's grpc.aio context.
            code: of the status.
            text: of the status.

        Raises:
            grpc.aio.AbortError: always, as `context.abort` does.
        """
        self.when_lingering(context)  # before: gRPC waits until the status has gone out
        await context.abort(code, text)

    def _lingers(self, peer: str) -> None:
        if not self._due:  # one search of the sockets for all that are due at about the same time
            asyncio.get_running_loop().call_later(self._seconds / 10, self._hang_up)
        self._due.add(peer)

    def _hang_up(self) -> None:
        due, self._due = self._due, set()
        log("hung_up", connections=shut_down({address_of(peer) for peer in due}))


Address = tuple[IPv4Address | IPv6Address, int]


def address_of(peer: str) -> Address:
    """Host and port from gRPC's name of a peer, such as `ipv4:10.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return _host(host.strip("[]")), int(port)


def shut_down(peers: set[Address]) -> int:
    """Shut down this process's connections with some peers; returns how many there were.

    Args:
        peers: their addresses and ports.
    """
    found = 0
    for connection, peer, _ in _connections():
        if peer in peers:
            with contextlib.suppress(OSError):  # the peer has hung up itself
                connection.shutdown(socket.SHUT_RDWR)
                found += 1
    return found


def _connections() -> Iterator[tuple[socket.socket, Address, int]]:
    """This process's connections, with the peer and the own port of each; open for as long as they are looked at."""
    for file in OWN_FILES.iterdir():
        with contextlib.suppress(OSError):  # it has been closed since, or is no connection
            if not stat.S_ISSOCK(os.fstat(int(file.name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(file.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    host, port = connection.getpeername()[:2]
                    yield connection, (_host(host), port), connection.getsockname()[1]


class IdleConnections:
    """Keeps room for newcomers among a server's connections. For one event loop.

    gRPC closes a further connection at once where there are `most`, whosever it is. So of what the connections with a
    call leave, those without one may have half. Beyond that, the host with most of them loses its oldest. Calls are
    bounded themselves: handshakes and health checks by host (`half_open`), sessions by key (`max-sessions`).

    Args:
        most: how many connections the server takes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._used: Counter[Address] = Counter()  # calls of each
        self._known: dict[Address, None] = {}  # in the order in which they were seen first

    @contextlib.contextmanager
    def in_use(self, peer: str) -> Iterator[None]:
        """A connection has a call for as long as the context lasts."""
        address = address_of(peer)
        self._used[address] += 1
        try:
            yield
        finally:
            self._used[address] -= 1
            if not self._used[address]:
                del self._used[address]

    def make_room(self, port: int) -> None:
        """Close those that are too many of a server that listens on a port."""
        if sum(1 for _ in OWN_FILES.iterdir()) <= self._most // 2:
            return
        here = dict.fromkeys(peer for _, peer, own in _connections() if own == port)
        self._known = {peer: None for peer in (*self._known, *here) if peer in here}
        idle = [peer for peer in self._known if peer not in self._used]
        count = len(idle) - max(0, self._most - len(self._used)) // 2
        if count > 0:
            log("made_room", connections=shut_down(set(surplus(idle, count))))


def surplus(idle: Sequence[Address], count: int) -> list[Address]:
    """Which `count` of these connections are closed: each time the oldest of the host that has most.

    Args:
        idle: the oldest first.
    """
    of_host: defaultdict[bytes, deque[Address]] = defaultdict(deque)
    for host, port in idle:
        of_host[host.packed[:8]].append((host, port))  # an IPv4 address, or the network of an IPv6 one
    return [max(of_host.values(), key=len).popleft() for _ in range(count)]


def _host(text: str) -> IPv4Address | IPv6Address:
    """An address without its zone; the IPv4 address of an IPv4-mapped IPv6 one, as gRPC writes it."""
    address = ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
