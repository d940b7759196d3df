"""What both ends of the gRPC stream agree on: names, sizes, options, and what makes gRPC messages of frames.

Neither side compresses, or takes what is compressed: sealed bytes do not shrink, and a compressed message of zeros
takes a thousand times the memory that it takes of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from isthmus.protocol.limits import DEFAULT_LIMITS, KEEPALIVE_SECONDS, KIB
from isthmus.protocol.secure.framing import read_frame, write_frame

SERVICE: Final = "isthmus.v2.Isthmus"
METHOD: Final = f"/{SERVICE}/Session"
OLD_METHOD: Final = "/isthmus.v1.Strip/Session"
"""Where edges of version 5 and older connect, which send frames as they are. It is served to refuse their version."""

MAX_GRPC_MESSAGE_BYTES: Final = DEFAULT_LIMITS.chunk_bytes + DEFAULT_LIMITS.max_header_bytes + KIB
"""A frame of the largest header and a whole chunk, with its prefix and tags."""
GOODBYE_SECONDS: Final = 2.0
"""How long either side waits for the end of a session that it ends, once all calls are answered."""
CLIENT_CODING: Final[dict[str, Callable[[bytes], bytes]]] = {
    "request_serializer": write_frame,
    "response_deserializer": read_frame,
}
"""What gRPC's client needs to call `METHOD`."""
SERVER_CODING: Final[dict[str, Callable[[bytes], bytes]]] = {
    "request_deserializer": read_frame,
    "response_serializer": write_frame,
}
"""What gRPC's server needs to serve it."""


def stream_options(window: int, keepalive: float = KEEPALIVE_SECONDS) -> list[tuple[str, int]]:
    """The options of gRPC that both ends have.

    Args:
        window: bytes that the other side may send on a stream before they are asked for.
        keepalive: seconds without a sign of the other side until it is asked for one.
    """
    milliseconds = round(keepalive * 1000)
    return [
        ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # only the one that changes nothing
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.max_pings_without_data", 0),  # without end: a long computation sends nothing
        ("grpc.http2.lookahead_bytes", window),
        ("grpc.http2.bdp_probe", 0),  # with it the window grows with the speed of the other side
    ]
