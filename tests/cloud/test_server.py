"""The data plane over real gRPC on the loopback, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import ipaddress
import json
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.clouds import Home, ThreadServer, served
from support.tiny import HIDDEN, tiny_checkpoint

from isthmus.backbone.errors import ConfigError
from isthmus.backbone.site_call import SiteCall
from isthmus.backbone.site_host import SiteHost
from isthmus.backbone.site_spec import Basis, Placement, SiteSpec
from isthmus.backbone.sites import Site
from isthmus.cloud import logs, pausing, server as server_module, stream as stream_module
from isthmus.cloud.directory import Peer, Seat
from isthmus.cloud.loading import EdgesFile
from isthmus.cloud.metrics import serve_metrics
from isthmus.cloud.scheduler import Share
from isthmus.cloud.server import Served, ServerTls, StripServer
from isthmus.cloud.stream import SealedStream
from isthmus.edge.channel import Channel, Traffic
from isthmus.edge.transport import GrpcTransport, Stream, Tls
from isthmus.protocol import messages as m
from isthmus.protocol.codecs import Role, codec_id, encode
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.errors import (
    ConnectionLostError,
    DrainingError,
    FingerprintError,
    NotEnrolledError,
    OverQuotaError,
    PortInUseError,
    TooLateError,
    UnreachableError,
)
from isthmus.protocol.keys import Fingerprint, load_edge, load_worker
from isthmus.protocol.sealing import Opener
from isthmus.protocol.service import METHOD, SERVICE
from isthmus.protocol.session import EdgeSession, Established, Received


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("server")
    return served(tiny_checkpoint("llama", folder / "model"), folder / "parts")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def server(cloud: Served, home: Home) -> Iterator[ThreadServer]:
    with ThreadServer(cloud, home) as running:
        yield running


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The structured log, parsed."""
    stream = io.StringIO()
    handler = logs.logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    before = logs.LOGGER.handlers[:], logs.LOGGER.level, logs.LOGGER.propagate
    logs.LOGGER.handlers[:] = [handler]
    logs.LOGGER.setLevel("INFO")
    logs.LOGGER.propagate = False
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logs.LOGGER.handlers[:], logs.LOGGER.propagate = before[0], before[2]
    logs.LOGGER.setLevel(before[1])


def hidden(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(0))


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.01)


def channel(server: ThreadServer, link: bytes = b"l" * 16, key: Path | None = None) -> Channel:
    transport = GrpcTransport(f"127.0.0.1:{server.port}")
    private = load_edge(key or server.home.key_file)
    return Channel(transport.open(), server.home.pin, private, link, Traffic(), lambda *_: None)


@contextlib.contextmanager
def raw(server: ThreadServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as plain:
        yield plain


# Who gets in ----------------------------------------------------------------------------------------------------------


def test_an_enrolled_edge_gets_the_spans_answers(server: ThreadServer, cloud: Served) -> None:
    with server.link() as link:
        link.open(5)
        output, kept = link.forward_span(hidden(), None, None, keep=True)
        given = hidden().requires_grad_(True)
        expected = cloud.executor.host.span(given)
        assert torch.equal(output, expected)
        result = link.backward_span(kept, torch.ones_like(output), hidden(), None, None)
        assert torch.equal(result, torch.autograd.grad(expected, given, torch.ones_like(expected))[0])
        assert server.server.status()["sessions"] == {"alice": 1}
        assert link.cloud_peak_bytes()
    eventually(lambda: server.server.status()["sessions"] == {})
    eventually(lambda: cloud.executor.used_bytes == 0)


def test_an_unknown_edge_is_refused_and_an_enrolment_needs_no_restart(server: ThreadServer) -> None:
    bob = server.home.new_edge("bob", enrolled=False)
    with server.link(bob) as link, pytest.raises(NotEnrolledError, match="SHA256:"):
        link.open(5)
    from isthmus.protocol.enrolment import add_line

    add_line(server.home.folder / "authorized_edges", bob.with_name("bob.pub").read_text(), "bob")
    with server.link(bob) as link:
        link.open(5)
        assert server.server.status()["sessions"] == {"bob": 1}


def test_a_broken_edges_file_leaves_the_last_good_one_in_force(
    server: ThreadServer, log: Callable[[], list[dict[str, Any]]]
) -> None:
    with server.link() as link:
        link.open(5)
    with (server.home.folder / "authorized_edges").open("a") as file:
        file.write("max-sesions=2 ssh-ed25519 AAAA mallory\n")
    with server.link() as link:
        link.open(5)
    assert "line 2" in next(line["error"] for line in log() if line["event"] == "authorized_edges_unreadable")


def test_a_removed_edges_file_lets_nobody_in(server: ThreadServer) -> None:
    (server.home.folder / "authorized_edges").unlink()
    with server.link() as link, pytest.raises(NotEnrolledError):
        link.open(5)


def test_another_pin_is_refused_by_the_edge(server: ThreadServer) -> None:
    server.home.pin = Fingerprint.of(bytes(32))
    with server.link() as link, pytest.raises(FingerprintError):
        link.open(5)


def test_an_expired_certificate_is_refused_by_the_edge(cloud: Served, tmp_path: Path) -> None:
    with ThreadServer(cloud, Home(tmp_path, days=-1)) as server, server.link() as link, pytest.raises(FingerprintError):
        link.open(5)


def test_the_session_quota_counts_links_and_a_closed_one_is_free_again(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_sessions=2))
    with ThreadServer(cloud, home) as server, server.link() as first, server.link() as second, server.link() as third:
        first.open(5)
        second.open(5)
        with pytest.raises(OverQuotaError, match="2 sessions of alice are open, 2 are allowed"):
            third.open(5)
        second.close()
        eventually(lambda: server.server.status()["sessions"] == {"alice": 1})
        third.open(5)


def test_a_call_over_the_byte_quota_is_refused_and_the_session_goes_on(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=2000))
    with ThreadServer(cloud, home) as server, server.link() as link:
        link.open(5)
        with pytest.raises(OverQuotaError, match="2000 that alice may have"):
            link.forward_span(hidden(4, 20), None, None, keep=False)
        assert link.forward_span(hidden(1, 4), None, None, keep=False)[0].shape == (1, 4, HIDDEN)
        assert link.traffic.sessions == 1


def test_of_a_call_over_the_byte_quota_nothing_is_kept_while_it_comes(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers: list[Opener] = []
    create = Opener.__init__

    def record(opener: Opener, *args: Any) -> None:
        create(opener, *args)
        if threading.current_thread().name == "test-server":
            openers.append(opener)

    with ThreadServer(cloud, Home(tmp_path, quota=Quota(max_inflight_bytes=2000))) as server:
        with monkeypatch.context() as patched:
            patched.setattr(Opener, "__init__", record)
            edge = channel(server)
        (opener,) = openers
        payload = encode(torch.zeros(8, 4096, HIDDEN), "fp32", Role.ACTIVATION)  # four chunks
        large = m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32"))
        *first, last = edge._session.send(large)
        for count, frame in enumerate(first, 1):
            edge._stream.send(frame)
            eventually(lambda count=count: (under_way := opener._message) is not None and under_way.chunk == count)
            assert opener._message is not None
            assert len(opener._message.body) <= 2000
        edge._stream.send(last)
        said = edge._session.receive(edge._stream.receive(20))
        assert isinstance(said, Received)
        assert isinstance(said.message, m.Status)
        assert (said.message.code, said.message.id) == (m.StatusCode.OVER_QUOTA, large.id)
        small = encode(torch.zeros(1, 4, HIDDEN), "fp32", Role.ACTIVATION)
        answer = edge.ask(m.Forward(m.CallId(1, 2), False, small, None, None, codec_id("fp32")), 20)
        assert isinstance(answer, m.ForwardReply)
        edge.close()
        assert b'isthmus_refused_total{status="OVER_QUOTA"} 1.0' in server.server.metrics.text()


def test_a_session_that_opens_with_more_than_the_byte_quota_is_ended(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode(hidden(4, 20), "fp32", Role.ACTIVATION)
    large = m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32"))
    monkeypatch.setattr(Channel, "_attach", lambda edge, _: edge.ask(large, 20))
    with ThreadServer(cloud, Home(tmp_path, quota=Quota(max_inflight_bytes=2000))) as server:
        with pytest.raises(ConnectionLostError, match="rules were broken"):
            channel(server)
        assert server.server.status()["sessions"] == {}


def test_calls_that_exceed_the_byte_quota_together_wait_for_each_other(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = hidden().nbytes + 64
    entered, release = threading.Event(), threading.Event()
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        entered.set()
        release.wait(20)
        return original(*args, **options)

    monkeypatch.setattr(type(cloud.executor), "forward", slow)
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=quota))
    answers: list[torch.Tensor] = []
    with ThreadServer(cloud, home) as server, server.link() as first, server.link() as second:

        def call(link: Any) -> None:
            answers.append(link.forward_span(hidden(), None, None, keep=False)[0])

        threads = [threading.Thread(target=call, args=(link,)) for link in (first, second)]
        for link in (first, second):
            link.open(5)
        for thread in threads:
            thread.start()
        assert entered.wait(10)
        eventually(lambda: server.server.status()["in_flight"] == 2)
        eventually(lambda: len(server.server._turns) == 1)
        assert server.server._in_flight_bytes["alice"] <= quota
        release.set()
        for thread in threads:
            thread.join(10)
    assert len(answers) == 2
    assert torch.equal(answers[0], answers[1])


def test_of_a_tenants_quotas_a_worker_gives_the_part_of_the_sessions_that_it_has(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        release.wait(20)
        return original(*args, **options)

    monkeypatch.setattr(type(cloud.executor), "forward", slow)
    quota = Quota(max_inflight_bytes=5 * hidden().nbytes // 2, max_tokens_per_second=900)  # two calls at a time
    with ThreadServer(cloud, Home(tmp_path, quota=quota)) as server, server.link() as first, server.link() as second:
        for link in (first, second):
            link.open(5)
        tenant = next(iter(server.server._open.values())).tenant
        assert server.server._share(tenant).positions_per_second == 900
        seats = (Seat(str(tenant.fingerprint), "a link", 1.0), Seat("somebody else's", "another", 2.0))
        server.server.hear("here:1", (Peer("there:1", "serving", seats), Peer("gone:1", "draining")))
        assert server.server._share(tenant).positions_per_second == pytest.approx(600)
        threads = [
            threading.Thread(target=link.forward_span, args=(hidden(), None, None), kwargs={"keep": False})
            for link in (first, second)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.server.status()["in_flight"] == 2)
        eventually(lambda: len(server.server._turns) == 1)  # five thirds of a call are this worker's part
        release.set()
        for thread in threads:
            thread.join(20)
        eventually(lambda: server.server.status()["in_flight"] == 0)


def test_a_file_is_fetched_whatever_the_largest_call_is(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    served(model, tmp_path / "parts")
    (tmp_path / "parts" / "vocab.bin").write_bytes(bytes(9 << 20))
    small = served(model, tmp_path / "parts", max_tokens=1)
    with ThreadServer(small, Home(tmp_path)) as server, server.link() as link:
        link.open(5)
        piece = link._call(m.Blob, lambda attempt: m.Fetch(m.Shelf.PARTS, "vocab.bin", 0))
        assert (len(piece.data), piece.total) == (8 << 20, 9 << 20)


def test_a_backward_with_its_replay_fits_the_largest_message(cloud: Served) -> None:
    limits = cloud.info.limits
    hidden_bytes = limits.max_tokens_per_call * HIDDEN * 4
    assert limits.max_message_bytes >= 2 * hidden_bytes + limits.max_tokens_per_call * 5


def test_a_failure_of_the_server_is_logged_by_type_and_its_text_goes_nowhere(
    server: ThreadServer, log: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("the text of a letter")

    edge = channel(server)
    bodies: list[bytearray] = []
    monkeypatch.setattr(server_module.TenantSession, "handle", fail)
    monkeypatch.setattr(server_module, "wipe", bodies.append)
    with pytest.raises(ConnectionLostError, match="the session failed") as caught:
        edge.ask(m.Ping(1), 5)
    edge.abandon()
    eventually(lambda: any(line.get("error") == "KeyError" for line in log()))
    assert len(bodies) == 1
    assert "letter" not in str(caught.value) + json.dumps(log())


def test_a_reconnect_of_the_same_link_fences_the_older_session(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_sessions=1))
    with ThreadServer(cloud, home) as server:
        older = channel(server)
        newer = channel(server)  # within a quota of one, because it takes the older one's place
        with pytest.raises(ConnectionLostError):
            older.ask(m.Ping(1), 5)
        assert isinstance(newer.ask(m.Ping(2), 5), m.Pong)
        eventually(lambda: server.server.status()["sessions"] == {"alice": 1})
        newer.close()
        older.abandon()


def test_the_same_link_id_of_another_edge_fences_nobody(server: ThreadServer) -> None:
    bob = server.home.new_edge("bob")
    mine, other = channel(server), channel(server, key=bob)
    assert isinstance(mine.ask(m.Ping(1), 5), m.Pong)
    mine.close()
    other.close()


# Streams that do not behave -------------------------------------------------------------------------------------------


def test_a_handshake_that_stalls_is_ended(cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_SECONDS", 0.2)
    with ThreadServer(cloud, home) as server:
        stalled = GrpcTransport(f"127.0.0.1:{server.port}").open()
        with pytest.raises(ConnectionLostError, match="closed the stream"):
            stalled.receive(10)
        late = GrpcTransport(f"127.0.0.1:{server.port}").open()
        edge = EdgeSession(pin=home.pin, edge_key=load_edge(home.key_file))
        late.send(edge.start())
        late.receive(5)  # the server's hello; the edge never answers it
        with pytest.raises(ConnectionLostError, match="closed the stream"):
            late.receive(10)
        assert not server.server._half_open
        stalled.close()
        late.close()


def test_half_open_handshakes_are_limited_and_the_oldest_gives_way(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_HALF_OPEN", 2)
    monkeypatch.setattr(server_module, "HANDSHAKE_SECONDS", 600.0)
    with ThreadServer(cloud, home) as server:
        waiting = [GrpcTransport(f"127.0.0.1:{server.port}").open() for _ in range(4)]
        for stream in waiting[:2]:
            with pytest.raises(ConnectionLostError, match="closed the stream"):
                stream.receive(20)
        assert len(server.server._half_open) == 2
        with server.link() as link:  # whoever leaves handshakes half open keeps nobody out
            link.open(5)
            assert link.traffic.retries == 0
        for stream in waiting:
            stream.close()
        eventually(lambda: not server.server._half_open)


def test_a_handshake_under_way_outlasts_streams_that_say_nothing(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_HALF_OPEN", 2)
    monkeypatch.setattr(server_module, "HANDSHAKE_SECONDS", 600.0)
    with ThreadServer(cloud, home) as server:
        slow = GrpcTransport(f"127.0.0.1:{server.port}").open()
        edge = EdgeSession(pin=home.pin, edge_key=load_edge(home.key_file))
        slow.send(edge.start())
        answer = edge.receive(slow.receive(20))
        silent = [GrpcTransport(f"127.0.0.1:{server.port}").open() for _ in range(10)]
        for frame in answer.frames:
            slow.send(frame)
        assert isinstance(edge.receive(slow.receive(20)), Established)
        for stream in (slow, *silent):
            stream.close()


def test_the_limit_of_handshakes_holds_for_those_that_come_at_once(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_HALF_OPEN", 2)
    counts: list[int] = []

    class Context:
        async def send_initial_metadata(self, _: object) -> None:
            counts.append(len(plane._half_open))
            await asyncio.sleep(0.01)
            counts.append(len(plane._half_open))

        def peer(self) -> str:
            return "ipv4:10.0.0.1:5000"

    async def frames() -> AsyncIterator[bytes]:
        return
        yield b""  # makes it a generator

    async def come() -> None:
        await asyncio.gather(*(plane._session(frames(), Context()) for _ in range(5)))

    plane = StripServer(cloud, load_worker(home.folder), EdgesFile(home.folder), 1)
    asyncio.run(come())
    assert counts[:5] == [1, 2, 2, 2, 2]
    assert len(counts) == 5 + 2  # three were ended in the middle
    assert not plane._half_open


def test_an_edge_that_stops_in_the_middle_of_a_message_is_ended(
    server: ThreadServer, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "STALL_SECONDS", 0.2)
    slow = channel(server)
    payload = encode(torch.zeros(4, 4096, HIDDEN), "fp32", Role.ACTIVATION)  # two chunks
    frames = list(slow._session.send(m.Forward(m.CallId(1, 1), True, payload, None, None, codec_id("fp32"))))
    slow._stream.send(frames[0])
    with pytest.raises(ConnectionLostError, match="rules were broken"):
        slow._stream.receive(20)
    eventually(lambda: server.server.status()["sessions"] == {})
    slow.abandon()


def test_an_edge_that_takes_no_answers_is_ended_and_what_it_was_to_get_is_let_go(
    server: ThreadServer, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "STALL_SECONDS", 0.5)
    with raw(server) as plain:
        asked = hasty(plain, server.home, 64)  # of 512 KiB each, and nobody reads the answers
        with server.link() as witness:
            witness.open(5)
            expected = witness.forward_span(hidden(), None, None, keep=False)[0]
            eventually(lambda: server.server.status()["sessions"] == {"alice": 1}, 30)
            assert torch.equal(witness.forward_span(hidden(), None, None, keep=False)[0], expected)
            assert witness.traffic.sessions == 1
        eventually(lambda: server.server.status()["in_flight"] == 0)
        eventually(lambda: cloud.executor.used_bytes == 0)
        asked.cancel()


def hasty(plain: grpc.Channel, home: Home, calls: int) -> Any:
    """Attach to a cloud, send calls, and read no answer."""
    outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stream = plain.stream_stream(METHOD)(iter(outgoing.get, b""))
    edge = EdgeSession(pin=home.pin, edge_key=load_edge(home.key_file))
    outgoing.put(edge.start())
    outgoing.put(edge.receive(next(stream)).frames[0])
    edge.receive(next(stream))
    payload = encode(torch.zeros(1, 4096, HIDDEN), "fp32", Role.ACTIVATION)
    forwards = (m.Forward(m.CallId(1, n), False, payload, None, None, codec_id("fp32")) for n in range(calls))
    for message in (m.Attach(b"h" * 16), *forwards):
        for frame in edge.send(message):
            outgoing.put(frame)
    return stream


def test_an_edge_that_does_not_answer_a_question_is_ended(
    one_call: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ANSWER_SECONDS", 0.2)
    silent, other = channel(one_call), channel(one_call, b"m" * 16)
    assert isinstance(begin(silent), m.SiteQuestion)
    with pytest.raises(ConnectionLostError, match="rules were broken"):
        silent._stream.receive(20)
    eventually(lambda: one_call.server.status()["sessions"] == {"alice": 1})
    eventually(lambda: isinstance(begin(other), m.SiteQuestion))  # its thread is free again
    silent.abandon()
    other.abandon()


def test_an_edge_that_says_something_else_than_the_answer_is_ended_as_well(
    one_call: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ANSWER_SECONDS", 0.5)
    chatty = channel(one_call)
    assert isinstance(begin(chatty), m.SiteQuestion)

    def chat() -> None:
        for nonce in range(100):
            chatty.ask(m.Ping(nonce), 20)
            time.sleep(0.1)

    with pytest.raises(ConnectionLostError):
        chat()
    eventually(lambda: one_call.server.status()["sessions"] == {})
    chatty.abandon()


@pytest.mark.parametrize("frame", [b"", b"x", b"GET / HTTP/1.1\r\n\r\n", bytes(75), b"\xff" * 4096])
def test_garbage_instead_of_a_handshake_ends_the_stream_alone(
    server: ThreadServer, frame: bytes, log: Callable[[], list[dict[str, Any]]]
) -> None:
    stream = GrpcTransport(f"127.0.0.1:{server.port}").open()
    stream.send(frame)
    with contextlib.suppress(ConnectionLostError):
        stream.receive(5)  # a server may say that it speaks another version before it ends the stream
    with pytest.raises(ConnectionLostError):
        stream.receive(5)
    stream.close()
    eventually(lambda: any(line["event"] in {"protocol_error", "session_refused"} for line in log()))
    with server.link() as link:
        link.open(5)


@pytest.mark.parametrize("place", [0, 4, 20, -1])
def test_garbage_in_a_session_ends_that_session_alone(server: ThreadServer, place: int) -> None:
    with server.link() as witness:
        witness.open(5)
        victim = channel(server)
        frame = bytearray(next(victim._session.send(m.Ping(1))))
        frame[place] ^= 1
        victim._stream.send(bytes(frame))
        with pytest.raises(ConnectionLostError, match="rules were broken"):
            victim._stream.receive(5)
        victim.abandon()
        assert witness.cloud_peak_bytes()
        assert witness.traffic.sessions == 1


def established(server: ThreadServer, key: Path) -> tuple[Stream, EdgeSession]:
    """A session that has said nothing yet."""
    stream = GrpcTransport(f"127.0.0.1:{server.port}").open()
    edge = EdgeSession(pin=server.home.pin, edge_key=load_edge(key))
    stream.send(edge.start())
    stream.send(edge.receive(stream.receive(5)).frames[0])
    edge.receive(stream.receive(5))
    return stream, edge


def told(stream: Stream, edge: EdgeSession, message: m.Message) -> m.Message:
    """The answer to a message."""
    for frame in edge.send(message):
        stream.send(frame)
    received = edge.receive(stream.receive(5))
    assert isinstance(received, Received)
    return received.message


def test_a_session_that_does_not_open_with_attach_is_ended(
    server: ThreadServer, log: Callable[[], list[dict[str, Any]]]
) -> None:
    stream, edge = established(server, server.home.key_file)
    with pytest.raises(ConnectionLostError, match="rules were broken"):
        told(stream, edge, m.Ping(1))
    stream.close()
    eventually(lambda: any("opens with Attach, not with Ping" in line.get("error", "") for line in log()))
    assert server.server.status()["sessions"] == {}


def test_a_stage_attaches_for_the_tenants_that_it_names(server: ThreadServer) -> None:
    key = server.home.new_edge("stage-0", quota=Quota(max_sessions=9), stage=True)
    streams = []
    for number, account in enumerate((m.Account("bob", 3), m.Account("carol", 1), m.Account("bob", 3), None)):
        stream, edge = established(server, key)
        streams.append(stream)
        attached = told(stream, edge, m.Attach(bytes((number,)) * m.LINK_BYTES, account=account))
        assert attached == m.Status(m.StatusCode.OK, None, "attached")
        assert isinstance(told(stream, edge, m.Ping(1)), m.Pong)
    assert server.server.status()["sessions"] == {"bob": 2, "carol": 1, "stage-0": 1}
    accounts = server.server._compute._scheduler._accounts
    shares = {name: account.share for name, account in accounts.items()}
    assert shares == {"bob": Share(3), "carol": Share(1), "stage-0": Share(1)}
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("name", ["bob", "alice"])
def test_an_edge_attaches_for_no_tenant_not_even_itself(server: ThreadServer, name: str) -> None:
    stream, edge = established(server, server.home.key_file)
    refusal = told(stream, edge, m.Attach(b"l" * m.LINK_BYTES, account=m.Account(name, 9)))
    assert isinstance(refusal, m.Status)
    assert refusal.code == m.StatusCode.BAD_REQUEST
    assert "only a stage of a pipeline" in refusal.message
    with pytest.raises(ConnectionLostError):
        stream.receive(5)
    stream.close()
    assert server.server.status()["sessions"] == {}
    assert server.server._compute._scheduler.used() == {}


def test_an_edge_that_vanishes_in_a_call_leaves_nothing_behind(server: ThreadServer, cloud: Served) -> None:
    release = threading.Event()
    forward = cloud.executor.host.span.forward
    entered = threading.Event()

    def slow(*args: Any) -> torch.Tensor:
        entered.set()
        release.wait(10)
        return forward(*args)

    cloud.executor.host.span.forward = slow  # type: ignore[method-assign]  # the one way to hold a call in flight
    try:
        link = server.link()
        link.open(5)
        calling = threading.Thread(target=_swallow, args=(link,), daemon=True)
        calling.start()
        assert entered.wait(10)
        link._channel.abandon()  # type: ignore[union-attr]  # it is open
        eventually(lambda: server.server.status()["sessions"] == {})
    finally:
        release.set()
        del cloud.executor.host.span.forward
    link._closed = True
    eventually(lambda: server.server.status()["in_flight"] == 0)
    eventually(lambda: cloud.executor.used_bytes == 0)


def _swallow(link: Any) -> None:
    link._give_up_after = 0.1
    with contextlib.suppress(ConnectionLostError, UnreachableError):
        link.forward_span(hidden(), None, None, keep=True)
    link.close()


# Whose turn it is -----------------------------------------------------------------------------------------------------


def test_calls_have_their_turns_by_tenant_and_interactive_ones_come_first(cloud: Served, home: Home) -> None:
    home.new_edge("bob")
    keys = {"alice": home.key_file, "bob": home.key_file.parent / "bob"}
    order: list[str] = []
    original = type(cloud.executor).forward
    with ThreadServer(cloud, home, batching=False) as server, contextlib.ExitStack() as stack:

        def opened(tenant: str, **options: Any) -> Any:
            link = stack.enter_context(server.link(keys[tenant], **options))
            link.open(5)
            return link

        with call_in_flight(server, cloud) as held:
            links = {
                "alice 1": opened("alice"),
                "alice 2": opened("alice"),
                "alice 3": opened("alice"),
                "bob": opened("bob"),
                "bob, chat": opened("bob", interactive=True),
            }
            threads = []
            for rows, (name, link) in enumerate(links.items(), start=1):
                calls = server.server.status()["waiting"]

                def call(link: Any = link, rows: int = rows) -> None:
                    link.forward_span(hidden(rows, 3), None, None, keep=False)

                threads.append(threading.Thread(target=call, name=name))
                threads[-1].start()
                eventually(lambda calls=calls: server.server.status()["waiting"] != calls)
            assert server.server.status()["waiting"] == {"alice": 3, "bob": 2}
            names = dict(enumerate(links, start=1))

            def noted(self: Any, session: bytes, number: int, inputs: Any, **options: Any) -> Any:
                order.append(names[len(inputs.hidden)])
                return original(self, session, number, inputs, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(cloud.executor), "forward", noted)
                held.release.set()
                for thread in threads:
                    thread.join(10)
    assert order[0] == "bob, chat"
    assert order.index("bob") < order.index("alice 2")
    assert [name for name in order if name.startswith("alice")] == ["alice 1", "alice 2", "alice 3"]


@pytest.mark.parametrize("batching", [True, False])
def test_calls_of_several_tenants_share_a_pass_and_have_the_bits_of_their_own(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch, batching: bool
) -> None:
    monkeypatch.setattr("isthmus.cloud.executor.STATE_SHARE", 1e6)  # a tiny span is less than a call's forward state
    for name in ("carol", "dave"):
        home.new_edge(name)
    keys = [home.key_file, *(home.key_file.parent / name for name in ("carol", "dave"))]
    inputs = [hidden(rows, length) for rows, length in ((2, 6), (1, 16), (3, 12))]
    gradients = [torch.randn(each.shape) for each in inputs]
    results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with ThreadServer(cloud, home, batching=batching) as server, contextlib.ExitStack() as stack:
        links = [stack.enter_context(server.link(key)) for key in keys]
        for link in links:
            link.open(5)

        def step(number: int) -> None:
            output, call = links[number].forward_span(inputs[number], None, None, keep=True)[:2]
            results[number] = (output, links[number].backward_span(call, gradients[number], inputs[number], None, None))

        with call_in_flight(server, cloud) as held:
            threads = [threading.Thread(target=step, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            eventually(lambda: len(server.server.status()["waiting"]) == 3)
            held.release.set()
            for thread in threads:
                thread.join(10)
        shared = server.server.status()["calls_per_pass"]
    assert shared > 1.5 if batching else shared == 0
    for number, (output, gradient) in results.items():
        leaf = inputs[number].clone().requires_grad_()
        expected = cloud.executor.host.span(leaf)
        assert torch.equal(output, expected)
        assert torch.equal(gradient, *torch.autograd.grad(expected, leaf, gradients[number]))


def test_a_call_that_cannot_keep_its_deadline_is_refused_and_the_session_goes_on(cloud: Served, home: Home) -> None:
    home.new_edge("erin")
    with ThreadServer(cloud, home) as server:
        with server.link(home.key_file.parent / "erin", deadline=0.2) as link:
            link.open(5)
            with call_in_flight(server, cloud) as held:
                threading.Timer(0.5, held.release.set).start()
                with pytest.raises(TooLateError, match=r"within 0\.2 s"):
                    link.forward_span(hidden(), None, None, keep=False)
            assert len(link.forward_span(hidden(), None, None, keep=False)[0]) == len(hidden())
        assert refusals(server, "TOO_LATE") == 1
        assert server.server.status()["deadlines"]["refused"] == 1


def test_a_call_that_is_computed_after_its_deadline_counts_as_late(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> Any:
        now[0] += 31.0
        return original(*args, **options)

    with (
        ThreadServer(cloud, home, clock=lambda: now[0]) as server,
        server.link(deadline=30.0) as link,
        server.link() as patient,
    ):
        for each in (link, patient):
            each.open(5)
        with monkeypatch.context() as patch:
            patch.setattr(type(cloud.executor), "forward", slow)  # no pace is known yet, so it is begun
            for each in (link, patient):
                each.forward_span(hidden(), None, None, keep=False)
        assert server.server.status()["deadlines"] == {"met": 0, "late": 1, "refused": 0}
        for _ in range(3):
            link.forward_span(hidden(), None, None, keep=False)
        assert link.cloud_peak_bytes()  # no computing, so no deadline
        assert server.server.status()["deadlines"] == {"met": 3, "late": 1, "refused": 0}
        assert 'isthmus_deadline_calls_total{outcome="late"} 1.0' in server.server.metrics.text().decode()


def test_a_call_that_waits_beside_others_until_its_deadline_is_refused(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=hidden().nbytes + 64))  # one call at a time
    with ThreadServer(cloud, home) as server, server.link(deadline=0.2) as link:
        link.open(5)
        with call_in_flight(server, cloud):
            bodies: list[bytearray] = []
            monkeypatch.setattr(server_module, "wipe", bodies.append)
            with pytest.raises(TooLateError, match=r"within 0\.2 s"):
                link.forward_span(hidden(), None, None, keep=False)
            eventually(lambda: server.server.status()["in_flight"] == 1)  # the other one goes on
            assert len(bodies) == 1
            assert server.server.status()["deadlines"] == {"met": 0, "late": 0, "refused": 1}
        assert link.cloud_peak_bytes()
        assert link.traffic.sessions == 1


def test_the_wait_beside_others_is_taken_off_the_deadline(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    left: list[float | None] = []
    home = Home(tmp_path, quota=Quota(max_inflight_bytes=hidden().nbytes + 64))
    with ThreadServer(cloud, home, clock=lambda: now[0]) as server, server.link(deadline=30.0) as link:
        link.open(5)
        submit = server.server._compute.submit

        def noted(*args: Any, deadline: float | None = None, **options: Any) -> Any:
            left.append(deadline)
            return submit(*args, deadline=deadline, **options)

        with call_in_flight(server, cloud) as held:
            monkeypatch.setattr(server.server._compute, "submit", noted)
            calling = threading.Thread(target=link.forward_span, args=(hidden(), None, None), kwargs={"keep": False})
            calling.start()
            eventually(lambda: len(server.server._turns) == 1)
            now[0] += 10.0
            held.release.set()
            calling.join(10)
    assert left[0] == 20.0


def test_a_deadline_that_is_none_is_refused(cloud: Served, home: Home) -> None:
    with ThreadServer(cloud, home) as server:
        for deadline in (0.0, -1.0, 1e9, float("nan")):
            with pytest.raises(ConfigError, match="deadline"):
                server.link(deadline=deadline)


def refusals(server: ThreadServer, status: str) -> float:
    value = server.server.metrics.registry.get_sample_value("isthmus_refused_total", {"status": status})
    return value or 0.0


def test_a_tenant_over_its_rate_waits_and_what_nobody_waits_for_is_not_made(cloud: Served, tmp_path: Path) -> None:
    home = Home(tmp_path, quota=Quota(max_tokens_per_second=1))
    with ThreadServer(cloud, home) as server, server.link() as link:
        link.open(5)
        link.forward_span(hidden(2, 33), None, None, keep=False)
        enough = threading.Event()

        def look() -> None:
            if enough.is_set():
                raise UnreachableError("nobody waits any more")

        link.watch(look)
        calling = threading.Thread(target=_swallow, args=(link,), daemon=True)
        calling.start()
        eventually(lambda: server.server.status()["waiting"] == {"alice": 1})
        link._channel.abandon()  # type: ignore[union-attr]  # it is open
        eventually(lambda: server.server.status()["waiting"] == {})
        eventually(lambda: server.server.status()["in_flight"] == 0)
        enough.set()
        calling.join(10)


# Calls that have paused -----------------------------------------------------------------------------------------------


@pytest.fixture
def one_call(cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadServer]:
    """A server on which one call may have paused, so that one that is not over shows."""
    monkeypatch.setattr(pausing, "MAX_CALLS", 1)
    cloud.executor.evict_all()  # a server that ended in a hurry leaves forward states
    with ThreadServer(cloud, home) as running:
        yield running


def begin(open_channel: Channel, call: int = 1, parts: tuple[str, ...] = ("mlp.down_proj",)) -> m.Message:
    """Begin a call with sites in the cloud's last layer; returns the cloud's question, or why there is none."""
    open_channel.ask(m.Sites(1, tuple(SiteSpec(3, part) for part in parts)), 5)
    payload = encode(hidden(), "fp32", Role.ACTIVATION)
    return open_channel.ask(m.Forward(m.CallId(1, call), True, payload, None, None, codec_id("fp32"), sites=1), 5)


def answered(open_channel: Channel, question: m.Message) -> m.Message:
    """Answer the question of `begin` with nothing added; returns what came of the call."""
    assert isinstance(question, m.SiteQuestion)
    nothing = encode(torch.zeros(2, 6, HIDDEN), "fp32", Role.ACTIVATION)
    return open_channel.ask(m.SiteAnswer(question.id, (nothing,)), 5)


@contextlib.contextmanager
def beside(work: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Something that is done on a thread of its own meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def claimed(server: ThreadServer) -> int:
    """Calls that wait for a thread."""
    return len(server.server._call_threads._waiting)


def test_an_edge_that_vanishes_at_a_question_leaves_nothing_behind(one_call: ThreadServer, cloud: Served) -> None:
    first, second = channel(one_call), channel(one_call, b"m" * 16)
    assert isinstance(begin(first), m.SiteQuestion)
    with beside(lambda: begin(second)) as waiting:
        eventually(lambda: claimed(one_call) == 1)
        assert not waiting.done()
        first.abandon()
        assert isinstance(waiting.result(10), m.SiteQuestion)
    assert one_call.server.status()["sessions"] == {"alice": 1}
    eventually(lambda: one_call.server.status()["in_flight"] == 0)  # a pause is the edge's time
    second.abandon()
    eventually(lambda: one_call.server.status()["sessions"] == {})
    eventually(lambda: cloud.executor.used_bytes == 0)


def test_a_call_with_sites_waits_for_a_thread_and_is_answered_like_any_other(
    one_call: ThreadServer, cloud: Served
) -> None:
    first, bob = channel(one_call), one_call.home.new_edge("bob")
    site = Site("model.layers.3.mlp.down_proj", SiteSpec(3, "mlp.down_proj"), torch.nn.Linear(64, HIDDEN))
    torch.nn.init.zeros_(site.module.weight)
    torch.nn.init.zeros_(site.module.bias)
    question = begin(first)
    with one_call.link(bob) as second:
        second.open(5)
        call = SiteCall([site], keep=False)
        with beside(lambda: second.forward_span(hidden(), None, None, keep=False, sites=call)) as waiting:
            eventually(lambda: claimed(one_call) == 1)
            assert not waiting.done()
            assert isinstance(answered(first, question), m.ForwardReply)
            output, _ = waiting.result(10)
        assert torch.equal(output, cloud.executor.host.span(hidden()))
        assert second.traffic.retries == 0
    first.abandon()


def test_a_call_that_waits_for_a_thread_ends_with_its_session(one_call: ThreadServer) -> None:
    first, second, third = (channel(one_call, name * 16) for name in (b"l", b"m", b"n"))
    question = begin(first)
    with beside(lambda: begin(second)) as gone:
        eventually(lambda: claimed(one_call) == 1)
        second.abandon()
        with pytest.raises(ConnectionLostError):
            gone.result(10)
    eventually(lambda: claimed(one_call) == 0)
    with beside(lambda: begin(third)) as waiting:
        eventually(lambda: claimed(one_call) == 1)
        assert isinstance(answered(first, question), m.ForwardReply)
        assert isinstance(waiting.result(10), m.SiteQuestion)
    for each in (first, third):
        each.abandon()


def test_a_session_whose_calls_have_paused_does_not_wait_for_a_thread(one_call: ThreadServer) -> None:
    """Else sessions that hold all threads could wait for each other's."""
    only = channel(one_call)
    question = begin(only)
    refused = begin(only, 2)
    assert isinstance(refused, m.Status)
    assert "no thread is free, and 1 have paused" in refused.message
    assert isinstance(answered(only, question), m.ForwardReply)
    assert isinstance(begin(only, 2), m.SiteQuestion)
    only.abandon()


def test_a_refused_call_keeps_no_thread(one_call: ThreadServer) -> None:
    first, second = channel(one_call), channel(one_call, b"m" * 16)
    payload = encode(hidden(), "fp32", Role.ACTIVATION)
    refused = first.ask(m.Forward(m.CallId(1, 1), True, payload, None, None, codec_id("fp32"), sites=9), 5)
    assert isinstance(refused, m.Status)
    assert isinstance(begin(second), m.SiteQuestion)
    for each in (first, second):
        each.abandon()


def test_a_tenant_with_many_calls_leaves_threads_to_the_others(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "MAX_CALLS", 2)
    bob = home.new_edge("bob")
    with ThreadServer(cloud, home) as server:
        first, second, other = channel(server), channel(server, b"m" * 16), channel(server, b"n" * 16, bob)
        question = begin(first)
        with beside(lambda: begin(second)) as waiting:
            eventually(lambda: claimed(server) == 1)
            assert isinstance(answered(other, begin(other)), m.ForwardReply)
            assert not waiting.done()
            assert isinstance(answered(first, question), m.ForwardReply)
            assert isinstance(waiting.result(10), m.SiteQuestion)
        for each in (first, second, other):
            each.abandon()


def test_a_drain_answers_a_call_that_waits_for_a_thread(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "MAX_CALLS", 1)
    server = ThreadServer(cloud, home).start()
    first, second = channel(server), channel(server, b"m" * 16)
    begin(first)
    with beside(lambda: begin(second)) as waiting:
        eventually(lambda: claimed(server) == 1)
        assert server.drain(20)
        assert isinstance(waiting.result(10), m.SiteQuestion)
    server._stop_loop()


def test_others_have_their_turns_between_the_matrices_of_a_list(
    server: ThreadServer, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = channel(server), channel(server, b"m" * 16)
    order: list[str] = []
    begun, asked = threading.Event(), threading.Event()
    matrices, forward = SiteHost.matrices, type(cloud.executor).forward

    def slow(host: SiteHost, spec: SiteSpec) -> Any:
        order.append(spec.part)
        begun.set()
        assert asked.wait(10)
        return matrices(host, spec)

    def noted(*args: Any, **options: Any) -> Any:
        order.append("another's call")
        return forward(*args, **options)

    monkeypatch.setattr(SiteHost, "matrices", slow)
    monkeypatch.setattr(type(cloud.executor), "forward", noted)
    parts = ("self_attn.q_proj", "self_attn.k_proj")
    specs = tuple(SiteSpec(3, part, Placement.LOW_RANK, 16, basis=Basis.SVD) for part in parts)
    payload = encode(hidden(), "fp32", Role.ACTIVATION)
    plain = m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32"))
    with beside(lambda: first.ask(m.Sites(1, specs), 20)) as binding:
        assert begun.wait(10)
        with beside(lambda: second.ask(plain, 20)) as calling:
            eventually(lambda: server.server.status()["waiting"] == {"alice": 1})
            asked.set()
            assert isinstance(calling.result(10), m.ForwardReply)
        said = binding.result(10)
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.OK
    assert order == [parts[0], "another's call", parts[1]]
    for each in (first, second):
        each.abandon()


def test_a_call_whose_answer_is_over_the_quota_is_over(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "MAX_CALLS", 1)
    with ThreadServer(cloud, Home(tmp_path, quota=Quota(max_inflight_bytes=2000))) as server:
        open_channel = channel(server)
        for call in range(2):
            question = begin(open_channel, call, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
            assert isinstance(question, m.SiteQuestion)
            contributions = [encode(torch.ones(2, 6, width), "fp32", Role.ACTIVATION) for width in (32, 16, 16)]
            said = open_channel.ask(m.SiteAnswer(question.id, tuple(contributions)), 5)
            assert isinstance(said, m.Status)
            assert (said.code, said.id) == (m.StatusCode.OVER_QUOTA, m.CallId(1, call))
        open_channel.abandon()


def test_a_drain_does_not_wait_for_an_edge_that_has_been_asked(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "MAX_CALLS", 1)
    server = ThreadServer(cloud, home).start()
    waiting = channel(server)
    question = begin(waiting)
    assert isinstance(question, m.SiteQuestion)
    threads = server.server._call_threads
    assert not threads._free
    assert server.drain(20)
    with pytest.raises(ConnectionLostError, match="draining"):
        waiting.ask(m.SiteAnswer(question.id, ()), 5)
    eventually(lambda: threads._free == 1)
    server._stop_loop()


def test_a_drain_ends_what_has_paused_though_its_session_is_slow_to_leave(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "MAX_CALLS", 1)
    monkeypatch.setattr(server_module, "GOODBYE_SECONDS", 0.1)
    send = SealedStream.send

    async def slowly(stream: SealedStream, message: m.Message) -> None:
        await asyncio.sleep(60 if isinstance(message, m.Goodbye) else 0)
        await send(stream, message)

    monkeypatch.setattr(SealedStream, "send", slowly)
    server = ThreadServer(cloud, home).start()
    assert isinstance(begin(channel(server)), m.SiteQuestion)
    assert server.drain(20)
    eventually(lambda: server.server._call_threads._free == 1)
    server._stop_loop()


# Draining -------------------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """A call in flight, and what it led to."""

    release: threading.Event
    result: list[Any]
    thread: threading.Thread


@contextlib.contextmanager
def call_in_flight(server: ThreadServer, cloud: Served) -> Iterator[Held]:
    link = server.link(give_up_after=0.1)
    link.open(5)
    entered, held = threading.Event(), Held(threading.Event(), [], threading.Thread())
    original = type(cloud.executor).forward

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        entered.set()
        held.release.wait(20)
        return original(*args, **options)

    def call() -> None:
        try:
            held.result.append(link.forward_span(hidden(), None, None, keep=False)[0])
        except UnreachableError as error:
            held.result.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cloud.executor), "forward", slow)
        held.thread = threading.Thread(target=call)
        held.thread.start()
        assert entered.wait(10)
        yield held
        held.release.set()
        held.thread.join(10)
    link.close()


def test_a_drain_answers_the_call_in_flight_and_refuses_newcomers(cloud: Served, home: Home) -> None:
    server = ThreadServer(cloud, home).start()
    bystander = channel(server)
    newcomers = GrpcTransport(f"127.0.0.1:{server.port}")
    newcomers.open().close()  # connected before the drain: the refusal comes from the session and not from the socket
    with call_in_flight(server, cloud) as held, raw(server) as plain:
        stub = health_pb2_grpc.HealthStub(plain)
        assert (
            stub.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status == health_pb2.HealthCheckResponse.SERVING
        )
        outcome: list[bool] = []
        draining = threading.Thread(target=lambda: outcome.append(server.drain(20)))
        draining.start()
        eventually(lambda: server.server.status()["state"] == "draining")
        with pytest.raises(ConnectionLostError, match="draining"):
            bystander.ask(m.Ping(1), 5)
        health = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status
        assert health == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(DrainingError, match="connect again"):
            Channel(newcomers.open(), home.pin, load_edge(home.key_file), b"n" * 16, Traffic(), lambda *_: None)
        assert not held.result
        held.release.set()
        draining.join(20)
        held.thread.join(10)
    assert outcome == [True]
    assert torch.equal(held.result[0], cloud.executor.host.span(hidden()))
    bystander.abandon()
    newcomers.close()
    server._stop_loop()


def test_a_drain_whose_grace_runs_out_says_so(cloud: Served, home: Home) -> None:
    server = ThreadServer(cloud, home).start()
    with call_in_flight(server, cloud) as held:
        assert server.drain(0.2) is False
        held.thread.join(10)
        assert isinstance(held.result[0], UnreachableError)
    server._stop_loop()


def test_an_idle_server_drains_at_once_and_says_goodbye(cloud: Served, home: Home) -> None:
    server = ThreadServer(cloud, home).start()
    idle = channel(server)
    assert server.drain(20) is True
    with pytest.raises(ConnectionLostError, match="the cloud ended the session: draining"):
        idle.ask(m.Ping(1), 5)
    idle.abandon()
    server._stop_loop()


# What stands beside the sessions --------------------------------------------------------------------------------------


def test_health_is_served_and_nothing_else(server: ThreadServer) -> None:
    with raw(server) as plain:
        stub = health_pb2_grpc.HealthStub(plain)
        for name in ("", SERVICE):
            assert (
                stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
            )
        for method in ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", METHOD + "s"):
            with pytest.raises(grpc.RpcError) as caught:
                list(plain.stream_stream(method)(iter([b""]), timeout=5))
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_metrics_and_status_count_and_hold_no_content(server: ThreadServer) -> None:
    endpoint = serve_metrics("127.0.0.1", 0, server.server.metrics.text, server.server.status)
    base = f"http://127.0.0.1:{endpoint.server_port}"
    try:
        with server.link() as link:
            link.open(5)
            output, kept = link.forward_span(hidden(), None, None, keep=True)
            status = json.loads(_text(f"{base}/status"))
            link.backward_span(kept, output, hidden(), None, None)
            eventually(lambda: 'isthmus_calls_total{operation="backward"} 1.0' in _text(f"{base}/metrics"))
        text = _text(f"{base}/metrics")
        with pytest.raises(urllib.error.HTTPError) as missing:
            _text(f"{base}/other")
        missing.value.close()
    finally:
        endpoint.shutdown()
        endpoint.server_close()
    assert missing.value.code == 404
    assert status["state"] == "serving"
    assert (status["model"], status["plan"], status["sessions"]) == ("tiny", "2:2", {"alice": 1})
    assert 0 < status["stash_bytes"] <= status["stash_budget_bytes"]
    assert 'isthmus_calls_total{operation="forward"} 1.0' in text
    assert 'isthmus_tokens_total{operation="forward"} 12.0' in text
    assert 'isthmus_handshakes_total{outcome="accepted"} 1.0' in text
    up = float(
        next(line.split()[1] for line in text.splitlines() if line.startswith('isthmus_bytes_total{direction="in"}'))
    )
    assert up >= 2 * hidden().nbytes
    assert "alice" not in text  # tenants' names are for the operator's own status page


def _text(url: str) -> str:
    with urllib.request.urlopen(url) as response:  # noqa: S310 - always http, made above
        return str(response.read().decode())


def test_the_log_tells_of_sessions_and_never_of_content(
    server: ThreadServer, log: Callable[[], list[dict[str, Any]]]
) -> None:
    with server.link() as link:
        link.open(5)
        link.forward_span(hidden(), None, None, keep=True)
        from isthmus.protocol.errors import RefusedError

        with pytest.raises(RefusedError):
            link._call(m.Blob, lambda attempt: m.Fetch(m.Shelf.PARTS, "tokenizer.model", 0))
    eventually(lambda: any(line["event"] == "session_closed" for line in log()))
    lines = log()
    fields = {"time", "level", "event", "tenant", "session", "ending", "in_flight", "sessions"}
    assert all(set(line) <= fields for line in lines), lines
    assert [line["ending"] for line in lines if line["event"] == "session_closed"] == ["goodbye"]
    key = server.home.key_file.read_text().splitlines()[1]
    assert key not in json.dumps(lines)


def test_a_port_in_use_has_its_own_error(server: ThreadServer, cloud: Served, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        second = ThreadServer(cloud, server.home, listen=address)
        with pytest.raises(PortInUseError, match=address), second:
            pass
        with pytest.raises(PortInUseError, match=address):
            serve_metrics("127.0.0.1", taken.getsockname()[1], server.server.metrics.text, dict)


# The outer layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pki:
    """A throw-away CA and what it signed, as PEM files."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("pki")
    now = datetime.datetime.now(datetime.UTC)

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    def make(common: str, signer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None) -> tuple[Path, Path, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        issuer, signing = signer or (name(common), key)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(common))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
                ),
                critical=False,
            )
        )
        cert = builder.sign(signing, hashes.SHA256())
        cert_file, key_file = folder / f"{common}.crt", folder / f"{common}.key"
        cert_file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file, key

    ca, _, ca_key = make("ca", None)
    server_cert, server_key, _ = make("server", (name("ca"), ca_key))
    client_cert, client_key, _ = make("client", (name("ca"), ca_key))
    return Pki(ca, server_cert, server_key, client_cert, client_key)


def test_tls_carries_the_sealed_session(cloud: Served, home: Home, pki: Pki) -> None:
    tls = ServerTls(pki.server_key.read_bytes(), pki.server_cert.read_bytes())
    with ThreadServer(cloud, home, tls) as server:
        assert server.address.startswith("isthmus+tls://")
        with server.link(tls=Tls(pki.ca)) as link:
            link.open(5)
            assert link.forward_span(hidden(), None, None, keep=False)[0].shape == (2, 6, HIDDEN)
        transport = GrpcTransport(f"127.0.0.1:{server.port}", None, connect_timeout=0.5)
        with pytest.raises(ConnectionLostError, match="no answer"):
            transport.open()


def test_mutual_tls_asks_for_a_certificate_and_authorises_nobody(cloud: Served, home: Home, pki: Pki) -> None:
    tls = ServerTls(pki.server_key.read_bytes(), pki.server_cert.read_bytes(), pki.ca.read_bytes())
    with ThreadServer(cloud, home, tls) as server:
        with server.link(tls=Tls(pki.ca, pki.client_cert, pki.client_key)) as link:
            link.open(5)
        stranger = home.new_edge("stranger", enrolled=False)
        with (
            server.link(stranger, tls=Tls(pki.ca, pki.client_cert, pki.client_key)) as link,
            pytest.raises(NotEnrolledError),
        ):
            link.open(5)
        bare = GrpcTransport(f"127.0.0.1:{server.port}", Tls(pki.ca), connect_timeout=0.5)
        with pytest.raises(ConnectionLostError):
            bare.open().receive(2)
        bare.close()
