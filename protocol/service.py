"""What both ends of the gRPC stream agree on: names, sizes, and how a frame of the session becomes a gRPC message.

A gRPC message is a `Frame` of `isthmus.proto`. Protobuf would take 1.2 ms to write one of 1 MiB, most of it in fresh
pages for two copies more, where joining the same bytes takes 0.02 ms. So this file joins them, and takes nothing but
what protobuf would write.

Neither side compresses, or takes what is compressed: sealed bytes do not shrink, and a compressed message of zeros
takes a thousand times the memory that it takes of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from isthmus.protocol.limits import DEFAULT_LIMITS, KIB
from isthmus.protocol.secure.framing import FLIGHT_PREFIX, PREFIX, Kind

SERVICE: Final = "isthmus.v2.Isthmus"
METHOD: Final = f"/{SERVICE}/Session"
OLD_METHOD: Final = "/isthmus.v1.Strip/Session"
"""Where edges of version 5 and older connect, which send frames as they are. It is served to refuse their version."""

MAX_GRPC_MESSAGE_BYTES: Final = DEFAULT_LIMITS.chunk_bytes + DEFAULT_LIMITS.max_header_bytes + KIB
"""A frame of the largest header and a whole chunk, with its prefix and tags."""
KEEPALIVE_MS: Final = 20_000  # a peer that vanished without a word is noticed within two of these

_PREFIX_FIELD, _SEALED_FIELD = 0x0A, 0x12  # numbers 1 and 2, of bytes


def write_frame(frame: bytes) -> bytes:
    """Make the gRPC message of a frame."""
    prefix = frame[: _prefix_size(frame)]
    if not prefix:
        return b""
    start = bytes((_PREFIX_FIELD, len(prefix))) + prefix
    if len(frame) == len(prefix):
        return start
    return b"".join((start, _sealed_start(len(frame) - len(prefix)), memoryview(frame)[len(prefix) :]))


def read_frame(message: bytes) -> bytes:
    """Take the frame out of a gRPC message. What is no `Frame` gives no bytes, which a session refuses as no frame."""
    if len(message) < 2 or message[0] != _PREFIX_FIELD:
        return b""
    prefix, rest = message[2 : 2 + message[1]], memoryview(message)[2 + message[1] :]
    if not 0 < message[1] == len(prefix) <= _prefix_size(prefix):
        return b""
    if not rest:
        return prefix
    for width in range(2, min(6, len(rest))):  # of the second field's start: its number, and a length of 1 to 4 bytes
        if bytes(rest[:width]) == _sealed_start(len(rest) - width) and len(prefix) == _prefix_size(prefix):
            return b"".join((prefix, rest[width:]))
    return b""


def _prefix_size(frame: bytes) -> int:
    """Bytes of a frame that are in the clear, by its kind."""
    return PREFIX.size if frame[4:5] >= bytes((Kind.DATA,)) else FLIGHT_PREFIX.size


def _sealed_start(size: int) -> bytes:
    start = bytearray((_SEALED_FIELD,))
    while size > 127:
        start.append(size & 127 | 128)
        size >>= 7
    start.append(size)
    return bytes(start)


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


def stream_options(window: int) -> list[tuple[str, int]]:
    """The options of gRPC that both ends have.

    Args:
        window: bytes that the other side may send on a stream before they are asked for.
    """
    return [
        ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # only the one that changes nothing
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ("grpc.http2.lookahead_bytes", window),
        ("grpc.http2.bdp_probe", 0),  # with it the window grows with the speed of the other side
    ]
