"""The gRPC transport, against a server that does what the test says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.common.errors import ConfigError, ConnectionLostError, KeyFileError, VersionError
from isthmus.protocol.service import METHOD, OLD_METHOD, SERVER_CODING, SERVICE
from isthmus.rpc.transport import QUEUED_FRAMES, GrpcTransport, NothingYetError, Tls

Behaviour = Callable[[Iterator[bytes], Any], Iterator[bytes]]


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], GrpcTransport]]:
    """Start a server whose streams behave as given; returns a transport to it."""
    servers: list[grpc.Server] = []
    transports: list[GrpcTransport] = []

    def start(behaviour: Behaviour) -> GrpcTransport:
        def taken(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
            context.send_initial_metadata(())
            yield from behaviour(frames, context)

        server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.stream_stream_rpc_method_handler(taken, **SERVER_CODING)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, {METHOD.rsplit("/", 1)[1]: handler})]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        transports.append(GrpcTransport(f"127.0.0.1:{port}"))
        return transports[-1]

    yield start
    for transport in transports:
        transport.close()
    for server in servers:
        server.stop(0).wait()


def echo(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
    yield from frames


def test_frames_arrive_whole_and_in_order(serve: Callable[[Behaviour], GrpcTransport]) -> None:
    stream = serve(echo).open()
    sent = [bytes([n]) * size for n, size in enumerate([0, 1, 75, 1 << 20, 1_448])]
    for frame in sent:
        stream.send(frame)
    assert [stream.receive(10) for _ in sent] == sent
    stream.close()
    stream.close()


def test_a_cloud_that_does_not_know_the_service_speaks_another_version() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    old = grpc.stream_stream_rpc_method_handler(echo)
    _, service, method = OLD_METHOD.split("/")
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: old})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = GrpcTransport(f"127.0.0.1:{port}")
    try:
        stream = transport.open()
        for _ in range(2):
            with pytest.raises(VersionError, match="Use the same release on both sides") as caught:
                stream.receive(10)
        assert caught.value.exit_code == 33
    finally:
        transport.close()
        server.stop(0).wait()


def test_what_arrived_before_the_end_is_received_first(serve: Callable[[Behaviour], GrpcTransport]) -> None:
    def last_word(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield b"goodbye"

    stream = serve(last_word).open()
    reader_done = threading.Event()
    threading.Timer(0.2, reader_done.set).start()
    reader_done.wait()
    stream.send(b"too late")
    assert stream.receive(10) == b"goodbye"
    for _ in range(2):  # the end stays the end
        with pytest.raises(ConnectionLostError, match="closed the stream"):
            stream.receive(10)
    stream.close()


def test_an_abort_tells_its_reason(serve: Callable[[Behaviour], GrpcTransport]) -> None:
    def refuse(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        yield b""

    stream = serve(refuse).open()
    with pytest.raises(ConnectionLostError, match="resource_exhausted: too many"):
        stream.receive(10)
    stream.close()


def test_a_silent_cloud_is_lost_after_the_timeout(serve: Callable[[Behaviour], GrpcTransport]) -> None:
    ended = threading.Event()

    def silent(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.add_callback(ended.set)
        yield from (frame for frame in frames if False)

    stream = serve(silent).open()
    stream.send(b"anybody?")
    for _ in range(2):  # a wait may be repeated
        with pytest.raises(NothingYetError, match="no answer within 0 s"):
            stream.receive(0.1)
    stream.close()
    assert ended.wait(10)  # the stream is cancelled, not left behind
    with pytest.raises(ConnectionLostError, match="is closed"):
        stream.receive(10)


def test_a_cloud_that_sends_without_end_is_held_back(serve: Callable[[Behaviour], GrpcTransport]) -> None:
    sent, full = [0], threading.Event()

    def flood(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        while context.is_active():
            sent[0] += 1
            yield bytes(1 << 20)

    stream = serve(flood).open()
    full.wait(1.0)
    held = stream._incoming  # type: ignore[attr-defined]  # how much waits is not for anybody else to know
    assert len(held._frames) <= QUEUED_FRAMES
    assert sent[0] < 2000
    assert stream.receive(10) == bytes(1 << 20)  # and goes on when there is room
    stream.close()


def test_an_edge_does_not_queue_without_end(serve: Callable[[Behaviour], GrpcTransport]) -> None:
    done = threading.Event()

    def deaf(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        done.wait(30)
        yield from frames

    stream = serve(deaf).open()

    def send_without_end() -> None:
        for _ in range(400):
            stream.send(bytes(1 << 20))

    with pytest.raises(NothingYetError, match="no more frames"):
        send_without_end()
    done.set()
    stream.send(b"more")  # there is room again
    stream.close()
    stream.send(b"too late")  # and nothing blocks once it is closed


def test_finish_delivers_what_was_queued(serve: Callable[[Behaviour], GrpcTransport]) -> None:
    seen: list[bytes] = []

    def collect(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        seen.extend(frames)
        yield b"all of it"

    stream = serve(collect).open()
    for n in range(20):
        stream.send(bytes([n]))
    stream.finish(10)
    assert seen == [bytes([n]) for n in range(20)]
    stream.close()


def test_nobody_there_is_a_lost_connection_and_can_be_tried_again() -> None:
    transport = GrpcTransport("127.0.0.1:1", connect_timeout=0.2)
    for _ in range(2):
        with pytest.raises(ConnectionLostError, match=r"no answer from 127\.0\.0\.1:1"):
            transport.open()
    transport.close()
    transport.close()


def test_somebody_else_on_the_port_is_nobody() -> None:
    """A listener that accepts and says nothing."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        transport = GrpcTransport(f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout=0.3)
        with pytest.raises(ConnectionLostError, match="no answer"):
            transport.open()


@pytest.mark.parametrize("half", [Tls(cert=Path("a")), Tls(key=Path("a"))])
def test_half_a_key_pair_is_a_mistake_of_the_configuration(half: Tls) -> None:
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key belong together"):
        GrpcTransport("127.0.0.1:1", half)


def test_a_missing_tls_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"no-such\.pem"):
        GrpcTransport("127.0.0.1:1", Tls(ca=tmp_path / "no-such.pem"))
