"""A gRPC server that holds and does no more for strangers than the bounds say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from isthmus.cloud.bounds import Bounds
from isthmus.common.errors import PortInUseError
from isthmus.protocol.limits import KEEPALIVE_SECONDS, LEAST_KEEPALIVE_SECONDS
from isthmus.protocol.service import stream_options

IDLE_MS = 60_000
"""After which a connection without a stream is closed: it takes one of `max_connections`, and no edge needs it."""
PING_STRIKES = 2
"""HTTP/2 pings that come too soon after another, with nothing sent between them, before a connection is closed.

gRPC's own default: an honest peer's timer may be early once.
"""


def bounded_server(bounds: Bounds) -> grpc.aio.Server:
    """A server without services, that listens nowhere yet."""
    options = [
        ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a lottery
        *stream_options(bounds.stream_window),
        ("grpc.http2.min_ping_interval_without_data_ms", round(LEAST_KEEPALIVE_SECONDS * 500)),
        ("grpc.http2.max_ping_strikes", PING_STRIKES),
        ("grpc.max_allowed_incoming_connections", bounds.max_connections),
        ("grpc.max_concurrent_streams", bounds.max_connection_streams),
        ("grpc.server_handshake_timeout_ms", round(KEEPALIVE_SECONDS * 1000)),
        ("grpc.max_connection_idle_ms", IDLE_MS),  # without a stream
    ]
    return grpc.aio.server(options=options, maximum_concurrent_rpcs=bounds.max_streams)


def stream_handler(
    handle: Callable[[AsyncIterator[bytes], Any], Awaitable[None]], **coding: Any
) -> grpc.RpcMethodHandler:
    """gRPC's handler of a stream in both directions, for a function of what comes in and the context.

    gRPC's own iterator is a compiled asynchronous generator. One that is not read to its end, as of a stream that is
    cut off, would be left to the garbage collector, on whatever thread that runs, and after the loop is closed.
    """

    async def handle_read(_: object, context: Any) -> None:
        await handle(_Received(context), context)

    return grpc.stream_stream_rpc_method_handler(handle_read, **coding)


class _Received:
    """What comes in on a stream, read from its context."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        received: bytes = await self._context.read()
        if received is grpc.aio.EOF:
            raise StopAsyncIteration
        return received


def bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Have a server listen on `host:port`, with TLS where there are credentials; returns the port.

    Raises:
        PortInUseError: it cannot be listened on.
    """
    try:
        if credentials is None:
            return int(server.add_insecure_port(listen))
        return int(server.add_secure_port(listen, credentials))
    except RuntimeError as error:
        raise PortInUseError(f"cannot listen on {listen}: {error}") from None
