"""Closes connections whose peer does not take the end of a call. gRPC itself would wait for ever.

A peer that opens no HTTP/2 window for what a call has sent keeps that call and its memory alive after its handler has
returned: the status goes out behind the data, and grpc.aio has no way to reset a stream. So the connection's socket is
shut down, as if the network had failed, and gRPC cleans up after it. All calls of that connection end; an honest edge
has one connection for each of its sessions, and opens another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
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
    for file in OWN_FILES.iterdir():
        with contextlib.suppress(OSError):  # it has been closed since, or is no connection
            if not stat.S_ISSOCK(os.fstat(int(file.name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(file.name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                host, port = connection.getpeername()[:2]
                if (_host(host), port) in peers:
                    connection.shutdown(socket.SHUT_RDWR)
                    found += 1
    return found


def _host(text: str) -> IPv4Address | IPv6Address:
    """An address without its zone; the IPv4 address of an IPv4-mapped IPv6 one, as gRPC writes it."""
    address = ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
