"""The data plane over real gRPC on the loopback, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import queue
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.cloud.clouds import Home, ThreadServer
from support.cloud.pki import Pki, make_pki
from support.cloud.sessions import call_in_flight, channel, eventually, hidden
from support.models.tiny import HIDDEN

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.gateway import calls as calls_module, server as server_module
from isthmus.cloud.gateway.server import ServerTls
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry.metrics import serve_metrics
from isthmus.common.errors import (
    ConnectionLostError,
    DrainingError,
    NotEnrolledError,
    PortInUseError,
    UnreachableError,
    VersionError,
)
from isthmus.experiments.harness.blocking_stream import BlockingStream
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure import handshake
from isthmus.protocol.secure.framing import VERSION, TransferTimeout
from isthmus.protocol.secure.handshake import version_refusal
from isthmus.protocol.secure.keys import load_edge
from isthmus.protocol.service import CLIENT_CODING, METHOD, OLD_METHOD, SERVICE
from isthmus.protocol.session import EdgeSession
from isthmus.protocol.tensor_codecs import Role, codec_id, encode
from isthmus.rpc.secure_stream import SecureStream
from isthmus.rpc.transport import GrpcTransport, Tls, run


@contextlib.contextmanager
def raw(server: ThreadServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as plain:
        yield plain


# A session ------------------------------------------------------------------------------------------------------------


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
        assert link.cloud_peak_bytes() is not None
    eventually(lambda: server.server.status()["sessions"] == {})
    eventually(lambda: cloud.executor.cache.used == 0)


def test_a_session_lives_over_three_renewals_of_its_keys(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "Limits", partial(Limits, least_renew_bytes=0))
    given = hidden().requires_grad_(True)
    expected = cloud.executor.host.span(given)
    gradient = torch.autograd.grad(expected, given, torch.ones_like(expected))[0]
    with (
        ThreadServer(cloud, home) as server,
        server.link(limits=Limits(renew_bytes=1)) as link,
        server.link(limits=Limits(renew_seconds=math.inf)) as other,
    ):
        for each in (link, other):
            each.open(60)
            for _ in range(4):  # a forward with an offer, a backward with the switch
                output, kept = each.forward_span(hidden(), None, None, keep=True)
                assert torch.equal(output, expected)
                result = each.backward_span(kept, torch.ones_like(output), hidden(), None, None)
                assert torch.equal(result, gradient)
            assert (each.traffic.sessions, each.traffic.retries) == (1, 0)
        epochs = [_epochs(each) for each in (link, other)]
        assert min(epochs[0]) >= 3
        assert epochs[1] == (0, 0)


def _epochs(link: Any) -> tuple[int, int]:
    session = link._keeper._stream._session
    return session._sealer._keys.epoch, session._opener._keys.epoch


def test_an_edge_that_renews_its_keys_too_often_is_ended(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[dict[str, Any]]]
) -> None:
    monkeypatch.setattr(server_module, "Limits", partial(Limits, least_renew_seconds=math.inf))
    with ThreadServer(cloud, home) as server:
        edge = channel(server, limits=Limits(renew_bytes=1))
        # The offer may end the stream before the ping behind it is written; gRPC then keeps the status to itself.
        with pytest.raises(ConnectionLostError, match=r"rules were broken|closed the stream"):
            edge.ask(m.Ping(1), 60)
        edge.abandon()
    assert any("an offer of fresh keys came" in line.get("error", "") for line in log())


def test_a_failure_of_the_server_is_logged_by_type_and_its_text_goes_nowhere(
    server: ThreadServer, log: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("the text of a letter")

    edge = channel(server)
    bodies: list[bytearray] = []
    monkeypatch.setattr(TenantSession, "handle", fail)
    monkeypatch.setattr(calls_module, "wipe", bodies.append)
    with pytest.raises(ConnectionLostError, match="the session failed") as caught:
        edge.ask(m.Ping(1), 5)
    edge.abandon()
    eventually(lambda: any(line.get("error") == "KeyError" for line in log()))
    assert len(bodies) == 1
    assert "letter" not in str(caught.value) + json.dumps(log())


# Streams that do not behave -------------------------------------------------------------------------------------------


def test_an_edge_that_stops_in_the_middle_of_a_message_is_ended(cloud: Served, home: Home) -> None:
    with ThreadServer(cloud, home, bounds=Bounds(transfer=TransferTimeout(0.2, 1 << 30))) as server:
        slow = channel(server)
        payload = encode(torch.zeros(128, 128, HIDDEN), "fp32", Role.ACTIVATION)  # two chunks
        frames = list(slow._session.send(m.Forward(m.CallId(1, 1), True, payload, None, None, codec_id("fp32"))))
        slow._stream.send(frames[0])
        with pytest.raises(ConnectionLostError, match="rules were broken"):
            slow._stream.receive(20)
        eventually(lambda: server.server.status()["sessions"] == {})
        slow.abandon()


def test_an_edge_that_takes_no_answers_is_ended_and_what_it_was_to_get_is_released(cloud: Served, home: Home) -> None:
    bounds = Bounds(transfer=TransferTimeout(0.5, 1 << 30), linger_seconds=0.2)
    with ThreadServer(cloud, home, bounds=bounds) as server, raw(server) as plain:
        asked = hasty(plain, server.home, 64)  # of 512 KiB each, and nobody reads the answers
        with server.link() as witness:
            witness.open(5)
            expected = witness.forward_span(hidden(), None, None, keep=False)[0]
            eventually(lambda: server.server.status()["sessions"] == {"alice": 1}, 30)
            assert torch.equal(witness.forward_span(hidden(), None, None, keep=False)[0], expected)
            assert witness.traffic.sessions == 1
        eventually(lambda: server.server.status()["in_flight"] == 0)
        eventually(lambda: cloud.executor.cache.used == 0)
        eventually(lambda: streams_of(server) == 0, 30)  # though what was sent on it has never been taken
        asked.cancel()


def streams_of(server: ThreadServer) -> int:
    """The gRPC calls that a server has not got rid of."""

    async def count() -> int:
        return sum(task.get_name().startswith("HandleExceptions") for task in asyncio.all_tasks())

    return int(server.run(count()))


def hasty(plain: grpc.Channel, home: Home, calls: int) -> Any:
    """Attach to a cloud, send calls, and read no answer."""
    outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stream = plain.stream_stream(METHOD, **CLIENT_CODING)(iter(outgoing.get, b""))
    edge = EdgeSession(pin=home.pin, edge_key=load_edge(home.key_file))
    outgoing.put(edge.start())
    outgoing.put(edge.receive(next(stream)).frames[0])
    edge.receive(next(stream))
    payload = encode(torch.zeros(32, 128, HIDDEN), "fp32", Role.ACTIVATION)
    forwards = (m.Forward(m.CallId(1, n), False, payload, None, None, codec_id("fp32")) for n in range(calls))
    for message in (m.Attach(b"h" * 16), *forwards):
        for frame in edge.send(message):
            outgoing.put(frame)
    return stream


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
        assert witness.cloud_peak_bytes() is not None
        assert witness.traffic.sessions == 1


# Draining -------------------------------------------------------------------------------------------------------------


def test_a_drain_answers_the_call_in_flight_and_refuses_newcomers(
    to_drain: ThreadServer, cloud: Served, home: Home
) -> None:
    bystander = channel(to_drain)
    newcomers = GrpcTransport(f"127.0.0.1:{to_drain.port}")

    async def enter() -> None:
        await SecureStream.open(await newcomers.open(), home.pin, load_edge(home.key_file), m.Attach(b"n" * 16))

    run(newcomers.open())  # connected before the drain: the refusal comes from the session and not from the socket
    with call_in_flight(to_drain, cloud) as held, raw(to_drain) as plain:
        stub = health_pb2_grpc.HealthStub(plain)
        assert (
            stub.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status == health_pb2.HealthCheckResponse.SERVING
        )
        outcome: list[bool] = []
        draining = threading.Thread(target=lambda: outcome.append(to_drain.drain(20)))
        draining.start()
        eventually(lambda: to_drain.server.status()["state"] == "draining")
        with pytest.raises(ConnectionLostError, match="draining"):
            bystander.ask(m.Ping(1), 5)
        health = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status
        assert health == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(DrainingError, match="connect again"):
            run(enter())
        assert not to_drain.server._admission._penalties._offences  # newcomers have done nothing wrong
        assert not held.result
        held.release.set()
        draining.join(20)
        held.thread.join(10)
    assert outcome == [True]
    assert torch.equal(held.result[0], cloud.executor.host.span(hidden()))
    bystander.abandon()
    run(newcomers.close())


def test_a_drain_whose_grace_runs_out_says_so(to_drain: ThreadServer, cloud: Served) -> None:
    with call_in_flight(to_drain, cloud) as held:
        assert to_drain.drain(0.2) is False
        held.thread.join(10)
        assert isinstance(held.result[0], UnreachableError)


def test_an_idle_server_drains_at_once_and_says_goodbye(to_drain: ThreadServer) -> None:
    idle = channel(to_drain)
    assert to_drain.drain(20) is True
    with pytest.raises(ConnectionLostError, match="the cloud ended the session: draining"):
        idle.ask(m.Ping(1), 5)
    idle.abandon()


# What stands beside the sessions --------------------------------------------------------------------------------------


def test_an_edge_of_an_older_release_is_told_the_version(
    server: ThreadServer, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = EdgeSession(pin=home.pin, edge_key=load_edge(home.key_file))
    with raw(server) as plain:
        with monkeypatch.context() as patch:
            patch.setattr(handshake, "VERSION", VERSION - 1)
            hello = edge.start()
        answers = list(plain.stream_stream(OLD_METHOD)(iter([hello]), timeout=20))
    assert answers == [version_refusal()]
    monkeypatch.setattr(handshake, "VERSION", VERSION - 1)
    with pytest.raises(VersionError, match=f"speaks version {VERSION}, this side version {VERSION - 1}") as caught:
        edge.receive(answers[0])
    assert caught.value.exit_code == 33


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
        from isthmus.common.errors import RefusedError

        with pytest.raises(RefusedError):
            link._keeper.ask(m.Blob, m.Fetch(m.FileSet.PARTS, "tokenizer.model", 0))
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


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("pki"))


def test_tls_carries_the_sealed_session(cloud: Served, home: Home, pki: Pki) -> None:
    tls = ServerTls(pki.server_key.read_bytes(), pki.server_cert.read_bytes())
    with ThreadServer(cloud, home, tls) as server:
        assert server.address.startswith("isthmus+tls://")
        with server.link(tls=Tls(pki.ca)) as link:
            link.open(5)
            assert link.forward_span(hidden(), None, None, keep=False)[0].shape == (2, 6, HIDDEN)
        transport = GrpcTransport(f"127.0.0.1:{server.port}", None, connect_timeout=0.5)
        with pytest.raises(ConnectionLostError, match="no answer"):
            run(transport.open())


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
        with pytest.raises(ConnectionLostError):
            BlockingStream(f"127.0.0.1:{server.port}", Tls(pki.ca), connect_timeout=0.5).receive(2)
