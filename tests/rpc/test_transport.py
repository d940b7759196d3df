"""The gRPC transport, against a server that does what the test says; and the event loop of a synchronous process."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.common.errors import ConfigError, ConnectionLostError, KeyFileError, LocalProtocolError
from isthmus.protocol.service import METHOD, SERVER_CODING, SERVICE
from isthmus.rpc.transport import PAUSE_FACTOR, EventLoop, GrpcTransport, Stream, Tls, pauses, run

Behaviour = Callable[[Iterator[bytes], Any], Iterator[bytes]]


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Stream]]:
    """Start a server whose streams behave as given; returns a stream to it."""
    servers: list[grpc.Server] = []
    transports: list[GrpcTransport] = []

    def start(behaviour: Behaviour) -> Stream:
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
        return run(transports[-1].open())

    yield start
    for transport in transports:
        run(transport.close())
    for server in servers:
        server.stop(0).wait()


def receive(stream: Stream, seconds: float = 10) -> bytes:
    return run(asyncio.wait_for(stream.receive(), seconds))


def echo(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
    yield from frames


def test_frames_arrive_whole_and_in_order(serve: Callable[[Behaviour], Stream]) -> None:
    stream = serve(echo)
    sent = [bytes([n]) * size for n, size in enumerate([0, 1, 75, 1 << 20, 1_448])]
    for frame in sent:
        run(stream.send(frame))
    assert [receive(stream) for _ in sent] == sent
    run(stream.close())
    run(stream.close())
    run(stream.send(b"too late"))
    with pytest.raises(ConnectionLostError, match="is closed"):
        receive(stream)


def test_what_arrived_before_the_end_is_received_first(serve: Callable[[Behaviour], Stream]) -> None:
    ended = threading.Event()

    def last_word(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.add_callback(ended.set)
        yield b"goodbye"

    stream = serve(last_word)
    assert ended.wait(10)
    run(stream.send(b"too late"))
    assert receive(stream) == b"goodbye"
    for _ in range(2):  # the end stays the end
        with pytest.raises(ConnectionLostError, match="closed the stream"):
            receive(stream)


def test_an_abort_tells_its_reason(serve: Callable[[Behaviour], Stream]) -> None:
    def refuse(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        yield b""

    with pytest.raises(ConnectionLostError, match="resource_exhausted: too many"):
        receive(serve(refuse))


def test_a_wait_may_be_repeated_and_a_stream_that_is_closed_ends(serve: Callable[[Behaviour], Stream]) -> None:
    ended = threading.Event()

    def slow(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.add_callback(ended.set)
        for frame in frames:
            if frame == b"now":
                yield frame

    stream = serve(slow)
    run(stream.send(b"anybody?"))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            receive(stream, 0.1)
    run(stream.send(b"now"))
    assert receive(stream) == b"now"
    assert not ended.is_set()
    run(stream.close())
    assert ended.wait(10)  # the stream is cancelled, not left behind
    with pytest.raises(ConnectionLostError, match="is closed"):
        receive(stream)


def test_a_stream_that_is_closed_ends_the_wait_of_another(serve: Callable[[Behaviour], Stream]) -> None:
    def silent(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield from (frame for frame in frames if False)

    async def close_soon(stream: Stream) -> None:
        asyncio.get_running_loop().call_later(0.1, asyncio.ensure_future, stream.close())
        await stream.receive()

    with pytest.raises(ConnectionLostError, match="is closed"):
        run(close_soon(serve(silent)))


def test_a_cloud_that_sends_without_end_is_held_back(serve: Callable[[Behaviour], Stream]) -> None:
    sent, waited = [0], threading.Event()

    def flood(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        while context.is_active():
            sent[0] += 1
            yield bytes(1 << 20)

    stream = serve(flood)
    waited.wait(1.0)
    assert sent[0] < 100
    assert receive(stream) == bytes(1 << 20)  # and goes on when it is asked


def test_an_edge_does_not_send_without_end(serve: Callable[[Behaviour], Stream]) -> None:
    done, taken = threading.Event(), [0]

    def deaf(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        done.wait(30)
        yield from frames

    stream = serve(deaf)

    async def send_without_end() -> None:
        for _ in range(400):
            await stream.send(bytes(1 << 20))
            taken[0] += 1

    with pytest.raises(TimeoutError):
        run(asyncio.wait_for(send_without_end(), 1.0))
    assert taken[0] < 100
    done.set()
    run(stream.send(b"too late"))  # and nothing waits once it is closed


def test_finish_delivers_what_was_sent(serve: Callable[[Behaviour], Stream]) -> None:
    seen: list[bytes] = []

    def collect(frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        seen.extend(frames)
        yield b"all of it"

    stream = serve(collect)
    for n in range(20):
        run(stream.send(bytes([n])))
    run(stream.finish())
    assert seen == [bytes([n]) for n in range(20)]


def test_nobody_there_is_a_lost_connection_and_can_be_tried_again() -> None:
    transport = GrpcTransport("127.0.0.1:1", connect_timeout=0.2)
    for _ in range(2):
        with pytest.raises(ConnectionLostError, match=r"no answer from 127\.0\.0\.1:1"):
            run(transport.open())
    run(transport.close())
    run(transport.close())


def test_somebody_else_on_the_port_is_nobody() -> None:
    """A listener that accepts and says nothing."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        transport = GrpcTransport(f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout=0.3)
        with pytest.raises(ConnectionLostError, match="no answer"):
            run(transport.open())


@pytest.mark.parametrize("half", [Tls(cert=Path("a")), Tls(key=Path("a"))])
def test_half_a_key_pair_is_a_mistake_of_the_configuration(half: Tls) -> None:
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key belong together"):
        GrpcTransport("127.0.0.1:1", half)


def test_a_missing_tls_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"no-such\.pem"):
        GrpcTransport("127.0.0.1:1", Tls(ca=tmp_path / "no-such.pem"))


def test_pauses_grow_up_to_a_bound() -> None:
    first = list(itertools.islice(pauses(2.0), 10))
    assert first[:3] == pytest.approx([0.1, 0.1 * PAUSE_FACTOR, 0.1 * PAUSE_FACTOR**2])
    assert first[-1] == 2.0
    assert first == sorted(first)


def test_jitter_shortens_each_by_up_to_half() -> None:
    plain = itertools.islice(pauses(5.0), 50)
    spread = itertools.islice(pauses(5.0, random.Random(1)), 50)  # noqa: S311  # no secret
    shares = [mine / full for mine, full in zip(spread, plain, strict=True)]
    assert all(0.5 <= share <= 1 for share in shares)
    assert len(set(shares)) == 50


# The event loop: waits that end early, forks, and the end of the process ----------------------------------------------


class WantedNoMoreError(Exception):
    pass


async def name_of_thread() -> str:
    return threading.current_thread().name


async def fail(error: BaseException) -> None:
    raise error


def test_all_threads_share_one_loop() -> None:
    names: list[str] = [run(name_of_thread())]
    thread = threading.Thread(target=lambda: names.append(run(name_of_thread())))
    thread.start()
    thread.join()
    assert names == ["isthmus-rpc"] * 2
    assert threading.current_thread().name != names[0]


@pytest.mark.parametrize("error", [TimeoutError("its own"), ValueError("its own")])
def test_an_error_of_the_work_is_raised(error: Exception) -> None:
    with pytest.raises(type(error), match="its own"):
        run(fail(error))


def test_a_wait_that_nobody_wants_is_cancelled() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def check() -> None:
        if begun.is_set():
            raise WantedNoMoreError

    with pytest.raises(WantedNoMoreError):
        run(wait(), check)
    assert cancelled.wait(10)
    assert run(name_of_thread()) == "isthmus-rpc"  # the loop goes on


def test_what_would_wait_for_itself_is_refused() -> None:
    async def inner() -> str:
        return run(name_of_thread())

    with pytest.raises(LocalProtocolError, match="a callback of its own"):
        run(inner())


def test_a_forked_process_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = EventLoop()
    assert loop.run(name_of_thread()) == "isthmus-rpc"
    mine = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: mine + 1)
    with pytest.raises(LocalProtocolError, match="cannot be used in a forked process"):
        loop.run(name_of_thread())


PROGRAM = """
import asyncio, concurrent.futures, contextlib, os, sys, threading
from isthmus.rpc.transport import GrpcTransport, run

async def forever():
    await asyncio.Event().wait()

async def open_a_channel():
    transport = GrpcTransport("127.0.0.1:1", connect_timeout=0.05)
    try:
        await transport.open()
    except Exception as error:
        return type(error).__name__

def wait():
    with contextlib.suppress(concurrent.futures.CancelledError):
        run(forever())

print(run(open_a_channel()), flush=True)
threading.Thread(target=wait, daemon=True).start()
{rest}
"""
FORKS = """
child = os.fork()
if child == 0:
    raise SystemExit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(
    ("rest", "printed", "code"),
    [("", [], 0), ("raise SystemExit(3)", [], 3), (FORKS, ["7"], 0)],
    ids=["end", "error", "fork"],
)
def test_a_process_that_has_not_closed_its_streams_ends(rest: str, printed: list[str], code: int) -> None:
    program = PROGRAM.format(rest=rest)
    as_users = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program],
        env=as_users, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.stdout.split() == ["ConnectionLostError", *printed]
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("given", "milliseconds"), [({}, 20_000), ({"keepalive": 1.5}, 1_500)])
def test_a_transport_asks_for_signs_of_life_as_often_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, float], milliseconds: int
) -> None:
    seen: list[dict[str, Any]] = []

    def channel(target: str, options: list[tuple[str, int]]) -> None:
        seen.append(dict(options))
        raise ConnectionLostError("that is all")

    monkeypatch.setattr("grpc.aio.insecure_channel", channel)
    with pytest.raises(ConnectionLostError, match="that is all"):
        run(GrpcTransport("127.0.0.1:1", **given).open())
    (options,) = seen
    assert (options["grpc.keepalive_time_ms"], options["grpc.keepalive_timeout_ms"]) == (milliseconds, milliseconds)
    assert options["grpc.http2.max_pings_without_data"] == 0


WAITS = """
import asyncio
import signal
from isthmus.rpc.transport import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background

async def wait():
    print("waiting", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        print("given up", flush=True)

run(wait())
"""


def test_ctrl_c_ends_a_wait() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waiting\n"
        waiting.send_signal(signal.SIGINT)
        printed, said = waiting.communicate(timeout=60)
    assert waiting.returncode == -signal.SIGINT
    assert said.endswith("KeyboardInterrupt\n")
    assert printed == "given up\n"  # the work was cancelled, not left behind
