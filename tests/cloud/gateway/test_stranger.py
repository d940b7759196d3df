"""What somebody without a key can make a server hold: the attacks of `isthmus.experiments.rigs.abuse`, and bounds."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.cloud.clouds import Home, ThreadServer
from support.cloud.sessions import eventually, hidden
from typer.testing import CliRunner

from isthmus.cli.cloud_commands import app
from isthmus.cloud.bounds import Bounds
from isthmus.cloud.control import supervisor
from isthmus.cloud.gateway.half_open import HalfOpen
from isthmus.cloud.gateway.hang_up import HangUp, address_of
from isthmus.cloud.gateway.health import MAX_QUESTION_BYTES, Health
from isthmus.cloud.session.served_model import Served
from isthmus.experiments.rigs.abuse.http2 import PING, Connection, frame
from isthmus.experiments.rigs.abuse.stranger import ATTACKS, CHECK, METHOD, WATCH, idle_connections, silent_streams
from isthmus.protocol.limits import Pace
from isthmus.protocol.service import MAX_GRPC_MESSAGE_BYTES, SERVICE

MIB = 1 << 20


def asked(server: ThreadServer, method: str, message: bytes, *, compressed: bool = False) -> tuple[str, str]:
    """The status of a call with one message, by name, and its text."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options) as plain:
        compression = grpc.Compression.Gzip if compressed else None
        call = plain.stream_stream(method)(iter([message]), compression=compression, timeout=20)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        return call.code().name, call.details()


def streams_of(server: ThreadServer) -> int:
    """The gRPC calls that a server has not got rid of."""

    async def count() -> int:
        return sum(task.get_name() == "rpc_task" for task in asyncio.all_tasks())

    return int(server.run(count()))


# Messages -------------------------------------------------------------------------------------------------------------

QUESTION = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()


@pytest.mark.parametrize(("method", "plain"), [(CHECK, "OK"), (METHOD, "INVALID_ARGUMENT")])
def test_a_compressed_message_is_refused_and_as_it_is_it_is_read(server: ThreadServer, method: str, plain: str) -> None:
    status, text = asked(server, method, QUESTION, compressed=True)
    assert status == "UNIMPLEMENTED"
    assert "gzip" in text
    assert asked(server, method, QUESTION)[0] == plain


def test_a_message_larger_than_a_frame_is_not_read(server: ThreadServer) -> None:
    assert asked(server, CHECK, bytes(MAX_GRPC_MESSAGE_BYTES))[0] == "INVALID_ARGUMENT"
    assert asked(server, CHECK, bytes(MAX_GRPC_MESSAGE_BYTES + 1))[0] == "RESOURCE_EXHAUSTED"


def test_health_is_asked_in_few_bytes_and_is_not_watched(server: ThreadServer) -> None:
    def question(name: str) -> bytes:
        return health_pb2.HealthCheckRequest(service=name).SerializeToString()

    assert asked(server, CHECK, question(SERVICE))[0] == "OK"
    assert asked(server, CHECK, question("a" * (MAX_QUESTION_BYTES - 3)))[0] == "NOT_FOUND"
    assert asked(server, CHECK, question("a" * MAX_QUESTION_BYTES))[0] == "INVALID_ARGUMENT"
    assert asked(server, CHECK, b"\xff" * 9)[0] == "INVALID_ARGUMENT"
    assert asked(server, WATCH, question(""))[0] == "UNIMPLEMENTED"


class ResetContext:
    """A grpc.aio context whose peer resets the stream while the answer is written."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"

    def add_done_callback(self, _: Callable[[Any], None]) -> None:
        pass

    async def send_initial_metadata(self, _: Any) -> None:
        pass

    async def write(self, _: bytes) -> None:
        raise grpc.aio.InternalError("Failed grpc_call_start_batch")


def test_who_resets_a_stream_while_health_is_answered_is_no_failure(
    log: Callable[[], list[dict[str, Any]]],
) -> None:
    async def question() -> AsyncIterator[bytes]:
        yield QUESTION

    async def run() -> None:
        half_open = HalfOpen(Bounds())
        health = Health(half_open, HangUp(3600))
        await health.serving()
        await health._check(question(), ResetContext())
        assert len(half_open) == 0

    asyncio.run(run())
    assert [line["error"] for line in log() if line["event"] == "stream_broke"] == ["InternalError"]


# Calls that nobody has authenticated ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["silent_streams", "silent_checks"])
def test_calls_that_say_nothing_are_ended(cloud: Served, home: Home, attack: str) -> None:
    with (
        ThreadServer(cloud, home, bounds=Bounds(handshake_seconds=0.3)) as server,
        ATTACKS[attack]("127.0.0.1", server.port),
    ):
        eventually(lambda: streams_of(server) == 0)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain:
            answer = health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


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


def test_one_host_has_its_own_bound_and_its_oldest_gives_way() -> None:
    ended: list[str] = []

    async def come(places: HalfOpen, host: str, name: str) -> None:
        try:
            async with places.place(host):
                await asyncio.sleep(3600)
        except TimeoutError:
            ended.append(name)

    async def run() -> None:
        places = HalfOpen(Bounds(max_half_open=4, max_half_open_per_host=2, handshake_seconds=3600))
        coming = [("a", "a1"), ("b", "b1"), ("a", "a2"), ("a", "a3"), ("c", "c1"), ("a", "a4"), ("d", "d1")]
        tasks = []
        for host, name in coming:
            tasks.append(asyncio.ensure_future(come(places, host, name)))
            for _ in range(5):  # turns of the loop, for whoever gives way to have gone
                await asyncio.sleep(0)
        assert len(places) == 4
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len(places) == 0

    asyncio.run(run())
    assert ended == ["a1", "a2", "a3"]  # the third one for d, as a had most


# Connections ----------------------------------------------------------------------------------------------------------


def test_connections_are_bounded_and_one_that_closes_makes_room(cloud: Served, home: Home) -> None:
    with (
        ThreadServer(cloud, home, bounds=Bounds(max_connections=3)) as server,
        idle_connections("127.0.0.1", server.port, 3) as held,
    ):
        with Connection("127.0.0.1", server.port) as further:
            assert further.hung_up(20)
        assert not any(connection.hung_up(0) for connection in held)
        held[0].close()
        with server.link(give_up_after=20) as link:
            link.open(20)


def test_all_calls_together_are_bounded(cloud: Served, home: Home) -> None:
    with (
        ThreadServer(cloud, home, bounds=Bounds(max_streams=2)) as server,
        silent_streams("127.0.0.1", server.port, 1, 2),
    ):
        eventually(lambda: streams_of(server) == 2)
        assert asked(server, CHECK, QUESTION)[0] == "RESOURCE_EXHAUSTED"


def test_a_connection_with_nothing_but_pings_is_closed(server: ThreadServer) -> None:
    with Connection("127.0.0.1", server.port) as patient, Connection("127.0.0.1", server.port) as connection:
        patient.send(frame(PING, 0, 0, bytes(8)))
        for _ in range(20):
            connection.send(frame(PING, 0, 0, bytes(8)))
        assert connection.hung_up(20)
        assert not patient.hung_up(0)


@pytest.mark.parametrize(
    ("peer", "host", "port"),
    [
        ("ipv4:10.0.0.1:5000", "10.0.0.1", 5000),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1", 5000),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::1", 5000),
        ("ipv6:[::ffff:10.0.0.1]:5000", "10.0.0.1", 5000),
    ],
)
def test_a_peers_address(peer: str, host: str, port: int) -> None:
    assert address_of(peer) == (ip_address(host), port)


def test_the_bounds_are_options_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Bounds] = []
    monkeypatch.setattr(supervisor, "serve", lambda *_, bounds, **__: given.append(bounds) or True)
    turned = ["--max-connections", "9", "--least-rate", "1KiB", "--stall-seconds", "3", "--max-session-age", "60"]
    for options in ([], turned):
        result = CliRunner().invoke(app, ["serve", "--model", "tiny", *options])
        assert result.exit_code == 0, result.output
    assert given[0] == Bounds()
    assert given[1] == Bounds(max_connections=9, max_session_age=60, pace=Pace(3, 1024))


# Memory ---------------------------------------------------------------------------------------------------------------

SERVER = """
import sys
from pathlib import Path
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint
folder = Path(sys.argv[1])
with ThreadServer(served(tiny_checkpoint("llama", folder / "model"), folder / "parts"), Home(folder)) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""


def resident(process: int) -> int:
    """Bytes of a process in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.server
def test_attacks_take_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{SERVER}", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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
