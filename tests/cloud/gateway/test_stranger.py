"""What somebody without a key can make a server hold: the attacks of `isthmus.experiments.rigs.abuse`, and bounds."""

from __future__ import annotations

import gc
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.cloud.clouds import Home, ThreadServer
from support.cloud.server_process import start
from support.cloud.sessions import eventually, hidden, status_of_call, streams_of
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.bounds import Bounds
from isthmus.cloud.gateway import bounded_server
from isthmus.cloud.gateway.hang_up import IdleConnections
from isthmus.cloud.session.served_model import Served
from isthmus.experiments.rigs.abuse.http2 import PING, Connection, frame
from isthmus.experiments.rigs.abuse.stranger import ATTACKS, CHECK, METHOD, idle_connections, open_streams
from isthmus.protocol.limits import MIB
from isthmus.protocol.service import MAX_GRPC_MESSAGE_BYTES, SERVICE

# Messages -------------------------------------------------------------------------------------------------------------

ITERATOR = "_MessageReceiver._async_message_receiver"
QUESTION = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()


@pytest.mark.parametrize(("method", "plain"), [(CHECK, "OK"), (METHOD, "INVALID_ARGUMENT")])
def test_a_compressed_message_is_refused_and_as_it_is_it_is_read(server: ThreadServer, method: str, plain: str) -> None:
    status, text = status_of_call(server, method, QUESTION, compressed=True)
    assert status == "UNIMPLEMENTED"
    assert "gzip" in text
    assert status_of_call(server, method, QUESTION)[0] == plain


def test_a_message_larger_than_a_frame_is_not_read(server: ThreadServer) -> None:
    assert status_of_call(server, CHECK, bytes(MAX_GRPC_MESSAGE_BYTES))[0] == "INVALID_ARGUMENT"
    assert status_of_call(server, CHECK, bytes(MAX_GRPC_MESSAGE_BYTES + 1))[0] == "RESOURCE_EXHAUSTED"


# Calls that nobody has authenticated ----------------------------------------------------------------------------------


def unread() -> dict[int, object]:
    """gRPC's own iterators that were not read to their end, by their addresses."""
    generators = [each for each in gc.get_objects() if type(each).__name__ == "async_generator"]
    return {id(each): each for each in generators if each.__qualname__ == ITERATOR}


@pytest.mark.parametrize("attack", ["silent_streams", "silent_checks"])
def test_calls_that_say_nothing_are_ended_and_leave_nothing_to_the_collector(
    cloud: Served, home: Home, attack: str
) -> None:
    before = unread()
    with (
        ThreadServer(cloud, home, bounds=Bounds(handshake_seconds=0.3)) as server,
        ATTACKS[attack]("127.0.0.1", server.port),
    ):
        eventually(lambda: streams_of(server) == 0)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain:
            answer = health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert not unread().keys() - before.keys()


@pytest.mark.parametrize("attack", ["starved_streams", "starved_checks"])
def test_calls_whose_answer_is_not_taken_are_ended_with_their_connection(
    cloud: Served, home: Home, attack: str
) -> None:
    bounds = Bounds(handshake_seconds=0.5, linger_seconds=0.2)
    with ThreadServer(cloud, home, bounds=bounds) as server, server.link() as link:
        link.open(20)
        with ATTACKS[attack]("127.0.0.1", server.port) as held:
            assert all(connection.hung_up(20) for connection in held)
            eventually(lambda: streams_of(server) == 1)  # the link's
        link.forward_span(hidden(), None, None, keep=False)
        assert link.traffic.retries == 0


# Connections ----------------------------------------------------------------------------------------------------------


def test_connections_are_bounded_and_one_that_closes_makes_room(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdleConnections, "make_room", lambda *_: None)  # which may look before the calls have begun
    with (
        ThreadServer(cloud, home, bounds=Bounds(max_connections=3, handshake_seconds=600)) as server,
        open_streams(METHOD, connections=3, streams=1)("127.0.0.1", server.port) as held,
    ):
        eventually(lambda: streams_of(server) == 3)
        with Connection("127.0.0.1", server.port) as further:
            assert further.hung_up(60)
        assert not any(connection.hung_up(0) for connection in held)
        held[0].close()
        with server.link(give_up_after=60) as link:
            link.open(60)


def test_connections_of_a_host_that_carry_no_call_keep_nobody_out(
    cloud: Served, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another edge of that host, nor one that has a session."""
    monkeypatch.setattr(bounded_server, "IDLE_MS", 3_600_000)  # after which gRPC itself would close them
    with ThreadServer(cloud, home, bounds=Bounds(max_connections=8)) as server, server.link() as early:
        early.open(60)
        with idle_connections(32)("127.0.0.1", server.port), server.link(give_up_after=60) as late:
            late.open(60)
            late.forward_span(hidden(), None, None, keep=False)
            early.forward_span(hidden(), None, None, keep=False)
            assert early.traffic.retries == 0


def test_all_calls_together_are_bounded(cloud: Served, home: Home) -> None:
    with (
        ThreadServer(cloud, home, bounds=Bounds(max_streams=2)) as server,
        open_streams(METHOD, connections=1, streams=2)("127.0.0.1", server.port),
    ):
        eventually(lambda: streams_of(server) == 2)
        assert status_of_call(server, CHECK, QUESTION)[0] == "RESOURCE_EXHAUSTED"


def test_a_connection_with_nothing_but_pings_is_closed(server: ThreadServer) -> None:
    with Connection("127.0.0.1", server.port) as patient, Connection("127.0.0.1", server.port) as connection:
        patient.send(frame(PING, 0, 0, bytes(8)))
        for _ in range(20):
            connection.send(frame(PING, 0, 0, bytes(8)))
        assert connection.hung_up(20)
        assert not patient.hung_up(0)


# Memory ---------------------------------------------------------------------------------------------------------------


def resident(process: int) -> int:
    """Bytes of a process in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.server
def test_attacks_take_little_memory(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    with start(model, tmp_path / "parts", Home(tmp_path)) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            before = resident(process.pid)
            for name, most in (
                ("compressed_watches", 32 * MIB),  # 830 MiB where they are not refused
                ("compressed_hellos", 32 * MIB),
                ("unfinished_messages", 64 * 3 * MIB),  # from one host
                ("unfinished_checks", 64 * 3 * MIB),
            ):
                with ATTACKS[name]("127.0.0.1", port):
                    assert resident(process.pid) - before < most, name
        finally:
            process.kill()
