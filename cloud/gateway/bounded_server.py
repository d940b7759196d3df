"""A gRPC server that holds and does no more for strangers than the bounds say."""

from __future__ import annotations

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
