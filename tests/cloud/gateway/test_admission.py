"""Who gets into a cloud over real gRPC, and who does not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import channel, eventually, hidden, raw_stream

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.control.worker_setup import EdgesFile
from isthmus.cloud.engine.requests import Share
from isthmus.cloud.gateway.penalties import Penalties
from isthmus.cloud.gateway.server import GatewayServer
from isthmus.cloud.home.identity import IdentityFiles
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConnectionLostError, FingerprintError, NotEnrolledError
from isthmus.experiments.harness.blocking_stream import BlockingStream
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.secure.keys import Fingerprint, load_edge
from isthmus.protocol.session import EdgeSession, Established, Received
from isthmus.protocol.tensor_codecs import Role, codec_id, encode
from isthmus.rpc.secure_stream import SecureStream

# Enrolled edges -------------------------------------------------------------------------------------------------------


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


# Handshakes that are half open ----------------------------------------------------------------------------------------


def test_a_handshake_that_stalls_is_ended(cloud: Served, home: Home) -> None:
    with ThreadServer(cloud, home, bounds=Bounds(handshake_seconds=0.2)) as server:
        stalled = raw_stream(server)
        with pytest.raises(ConnectionLostError, match="closed the stream"):
            stalled.receive(10)
        late = raw_stream(server)
        edge = EdgeSession(pin=home.pin, edge_key=load_edge(home.key_file))
        late.send(edge.start())
        late.receive(5)  # the server's hello; the edge never answers it
        with pytest.raises(ConnectionLostError, match="closed the stream"):
            late.receive(10)
        assert not server.server._admission._half_open
        stalled.close()
        late.close()


TWO_HALF_OPEN = Bounds(max_half_open=2, handshake_seconds=600.0)
"""Two handshakes may be half open, for as long as they like."""


def test_half_open_handshakes_are_limited_and_the_oldest_gives_way(cloud: Served, home: Home) -> None:
    with ThreadServer(cloud, home, bounds=TWO_HALF_OPEN) as server:
        waiting = [raw_stream(server) for _ in range(4)]
        for stream in waiting[:2]:
            with pytest.raises(ConnectionLostError, match="closed the stream"):
                stream.receive(20)
        assert len(server.server._admission._half_open) == 2
        with server.link() as link:  # whoever leaves handshakes half open keeps nobody out
            link.open(5)
            assert link.traffic.retries == 0
        for stream in waiting:
            stream.close()
        eventually(lambda: not server.server._admission._half_open)


def test_a_handshake_under_way_outlasts_streams_that_say_nothing(cloud: Served, home: Home) -> None:
    with ThreadServer(cloud, home, bounds=TWO_HALF_OPEN) as server:
        slow = raw_stream(server)
        edge = EdgeSession(pin=home.pin, edge_key=load_edge(home.key_file))
        slow.send(edge.start())
        answer = edge.receive(slow.receive(20))
        silent = [raw_stream(server) for _ in range(10)]
        for frame in answer.frames:
            slow.send(frame)
        assert isinstance(edge.receive(slow.receive(20)), Established)
        for stream in (slow, *silent):
            stream.close()


def test_the_limit_of_handshakes_holds_for_those_that_come_at_once(cloud: Served, home: Home) -> None:
    counts: list[int] = []

    class Context:
        async def send_initial_metadata(self, _: object) -> None:
            counts.append(len(plane._admission._half_open))
            await asyncio.sleep(0.01)
            counts.append(len(plane._admission._half_open))

        def peer(self) -> str:
            return "ipv4:10.0.0.1:5000"

        def add_done_callback(self, _: object) -> None:
            pass

    async def frames() -> AsyncIterator[bytes]:
        return
        yield b""  # makes it a generator

    async def come() -> None:
        await asyncio.gather(*(plane._session(frames(), Context()) for _ in range(5)))

    plane = GatewayServer(cloud, IdentityFiles(home.folder), EdgesFile(home.folder), 1, bounds=TWO_HALF_OPEN)
    asyncio.run(come())
    assert max(counts) == 2
    assert len(counts) == 2 * 5  # who gives way has been told first that the stream was taken, as gRPC needs it
    assert not plane._admission._half_open


@pytest.mark.parametrize("frame", [b"", b"x", b"GET / HTTP/1.1\r\n\r\n", bytes(75), b"\xff" * 4096])
def test_garbage_instead_of_a_handshake_ends_the_stream_alone(
    server: ThreadServer, frame: bytes, log: Callable[[], list[dict[str, Any]]]
) -> None:
    stream = raw_stream(server)
    stream.send(frame)
    with contextlib.suppress(ConnectionLostError):
        stream.receive(5)  # a server may say that it speaks another version before it ends the stream
    with pytest.raises(ConnectionLostError):
        stream.receive(5)
    stream.close()
    eventually(lambda: any(line["event"] in {"protocol_error", "session_refused"} for line in log()))
    with server.link() as link:
        link.open(5)


def test_an_honest_edge_does_not_wait_for_the_offences_of_others_at_its_address(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Penalties, "pause", lambda self, who: 3600.0 if who.startswith("ipv4:") else 0.0)
    with ThreadServer(cloud, home, bounds=Bounds(handshake_seconds=600.0)) as server:
        offender = raw_stream(server)
        offender.send(b"GET / HTTP/1.1")
        eventually(lambda: len(server.server._admission._half_open) == 1, 60)
        with server.link() as link:
            link.open(60)
        assert len(server.server._admission._half_open) == 1  # the control: the offender still waits
        offender.close()


def test_an_offence_counts_once_and_is_told_also_where_its_wait_is_cut_short(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[dict[str, Any]]]
) -> None:
    monkeypatch.setattr(Penalties, "pause", lambda _self, _who: 3600.0)
    bounds = Bounds(handshake_seconds=600.0, max_half_open_per_host=1)
    with ThreadServer(cloud, home, bounds=bounds) as server:
        offences = server.server._admission._penalties._offences
        offender = raw_stream(server)
        offender.send(b"GET / HTTP/1.1")
        eventually(lambda: bool(offences))
        newcomer = raw_stream(server)  # takes the place in which the offender waits
        with pytest.raises(ConnectionLostError, match="rules were broken"):
            offender.receive(60)
        assert [line["event"] for line in log() if line["event"] == "protocol_error"] == ["protocol_error"]
        assert [count for count, _ in offences.values()] == [1.0]
        for stream in (offender, newcomer):
            stream.close()


# How a session opens --------------------------------------------------------------------------------------------------


def established(server: ThreadServer, key: Path) -> tuple[BlockingStream, EdgeSession]:
    """A session that has said nothing yet."""
    stream = raw_stream(server)
    edge = EdgeSession(pin=server.home.pin, edge_key=load_edge(key))
    stream.send(edge.start())
    stream.send(edge.receive(stream.receive(5)).frames[0])
    edge.receive(stream.receive(5))
    return stream, edge


def told(stream: BlockingStream, edge: EdgeSession, message: m.Message) -> m.Message:
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
    assert [line["outcome"] for line in log() if line["event"] == "session_refused"] == ["failed"]
    assert server.server.status()["sessions"] == {}


def test_a_session_that_opens_with_more_than_the_byte_quota_is_ended(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode(hidden(4, 20), "fp32", Role.ACTIVATION)
    large = m.Forward(m.CallId(1, 1), False, payload, None, None, codec_id("fp32"))
    monkeypatch.setattr(SecureStream, "_attach", lambda edge, _: edge.ask(large, 20))
    with ThreadServer(cloud, Home(tmp_path, quota=Quota(max_inflight_bytes=2000))) as server:
        with pytest.raises(ConnectionLostError, match="rules were broken"):
            channel(server)
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
    accounts = server.server._calls.engine._scheduler._tenants
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
    assert "only another worker of this cloud" in refusal.message
    with pytest.raises(ConnectionLostError):
        stream.receive(5)
    stream.close()
    assert server.server.status()["sessions"] == {}
    assert server.server._calls.engine._scheduler._tenants == {}


# Penalties ------------------------------------------------------------------------------------------------------------


def test_whoever_breaks_the_rules_again_and_again_waits_to_be_admitted(server: ThreadServer) -> None:
    penalties, bob = server.server._admission._penalties, server.home.new_edge("bob")
    host, mallory = "ipv4:127.0.0.1", str(Fingerprint.of(load_edge(bob).public_key().public_bytes_raw()))
    with server.link() as link:
        link.open(5)
        for _ in range(7):
            stream, edge = established(server, bob)
            with pytest.raises(ConnectionLostError, match="rules were broken"):
                told(stream, edge, m.Ping(1))
            stream.close()
        assert penalties.pause(mallory) > 1
        assert penalties.pause(host) == 0.0  # it is known who it was
        for _ in range(7):
            with contextlib.closing(raw_stream(server)) as stream:
                stream.send(b"noise")
                with pytest.raises(ConnectionLostError, match="rules were broken"):
                    stream.receive(20)
        assert penalties.pause(host) > 1
        link.forward_span(hidden(), None, None, keep=False)
        assert link.traffic.retries == 0
        assert penalties.pause(host) > 0  # so nobody who is open waited for it
    with server.link() as again:
        again.open(20)
