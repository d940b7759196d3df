"""Bounds of connections, over real ones."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import h11
import pytest
import uvicorn

from isthmus.daemon.web import connections
from isthmus.daemon.web.connections import HEAD_BYTES, BoundedConnection

CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading a body: with much where the path is /much, and never where it is /never."""
    if scope["path"] == "/never":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(400 if scope["path"] == "/much" else 1):
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def _serving(most: int = 100, head: int = 4096) -> Iterator[tuple[int, uvicorn.Server]]:
    kind = type("Connection", (BoundedConnection,), {"most": most})
    config = uvicorn.Config(
        _app, http=kind, ws="none", lifespan="off", log_config=None, h11_max_incomplete_event_size=head
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        _until(lambda: server.started)
        try:
            yield port, server
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def _until(done: Callable[[], bool]) -> None:
    """Wait until something is so, in the server's thread."""
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _ones(server: uvicorn.Server) -> list[BoundedConnection]:
    return [one for one in list(server.server_state.connections) if isinstance(one, BoundedConnection)]


def _busy(server: uvicorn.Server) -> bool:
    return any(not one.rests for one in _ones(server))


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def _is_closed(client: socket.socket) -> bool:
    """Whether the other side closes the connection; what it still sends is dropped."""
    try:
        while client.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def _ok(client: socket.socket, path: bytes = b"/") -> bool:
    client.sendall(GET.replace(b" / ", b" " + path + b" "))
    return client.recv(15) == b"HTTP/1.1 200 OK"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "REST_SECONDS", "STALL_SECONDS"):
        monkeypatch.setattr(connections, name, 0.3)


@pytest.mark.parametrize("begun", [b"", b"GET / HT", GET + b"GET"])
def test_a_head_that_does_not_end_loses_its_connection(begun: bytes) -> None:
    with _serving() as (port, _), _connect(port) as client:
        client.sendall(begun)
        assert _is_closed(client)
        with _connect(port) as other:
            assert _ok(other)


def test_a_head_that_comes_in_drops_does_not_get_longer() -> None:
    with _serving() as (port, _), _connect(port) as client:

        def drip() -> None:
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    client.sendall(b"G")
                    threading.Event().wait(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        assert _is_closed(client)
        thread.join()


def test_a_request_that_takes_long_keeps_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with _serving() as (port, server), _connect(port) as client:
        client.sendall(GET.replace(b" / ", b" /never "))
        client.settimeout(1.0)
        assert not _is_closed(client)
        assert len(server.server_state.connections) == 1


@pytest.mark.parametrize("before", [b"", GET, CHUNKED + b"0\r\n\r\n"], ids=["alone", "behind one", "behind a body"])
@pytest.mark.parametrize("piece", [1 << 20, 10_000], ids=["at once", "in pieces"])
@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False), (1 << 20, False)])
def test_a_head_has_a_bound(before: bytes, piece: int, more: int, fits: bool) -> None:
    start = GET[:-2] + b"x: "
    head = start + b"a" * (HEAD_BYTES + more - len(start) - 4) + b"\r\n\r\n"
    assert len(head) == HEAD_BYTES + more
    with _serving(head=HEAD_BYTES) as (port, _), _connect(port) as client:
        sent = before + head
        with contextlib.suppress(OSError):  # it is closed before all is sent
            for at in range(0, len(sent), piece):
                client.sendall(sent[at : at + piece])
        got = b""
        with contextlib.suppress(OSError):
            while got.count(b"HTTP/1.1 ") <= bool(before):
                if not (taken := client.recv(1 << 20)):
                    break
                got += taken
        statuses = re.findall(rb"HTTP/1.1 (\d+)", got)
        # What has come of a large head when the connection is closed may take the refusal along (a reset).
        assert statuses[bool(before) :] == [b"200"] if fits else b"200" not in statuses[bool(before) :]


def test_a_body_that_goes_on_after_the_answer_loses_its_connection() -> None:
    with _serving() as (port, _), _connect(port) as client:
        client.sendall(CHUNKED)
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        with contextlib.suppress(OSError):
            while True:
                client.sendall(b"1\r\nx\r\n")
        assert _is_closed(client)


@pytest.mark.parametrize("length_is_said", [False, True])
def test_of_a_body_without_a_length_little_is_read_after_the_answer(
    monkeypatch: pytest.MonkeyPatch, length_is_said: bool
) -> None:
    monkeypatch.setattr(connections, "REST_SECONDS", 60.0)
    said = CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: %d" % (1 << 30))
    with _serving() as (port, server), _connect(port) as client:
        client.sendall(said if length_is_said else CHUNKED + b"%x\r\n" % (1 << 30))
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        (one,) = _ones(server)

        def flood() -> None:
            with contextlib.suppress(OSError):
                client.sendall(bytes(64 << 20))

        thread = threading.Thread(target=flood)
        thread.start()
        _until(lambda: one.flow.read_paused or one._dropped >= 32 << 20)
        assert one.flow.read_paused != length_is_said
        client.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_body_that_ends_soon_after_the_answer_keeps_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 60.0)
    with _serving() as (port, server), _connect(port) as client:
        client.sendall(CHUNKED)
        assert client.recv(1 << 20)
        client.sendall(b"0\r\n\r\n")
        while client.recv(1 << 20)[-5:] != b"0\r\n\r\n":
            pass
        (one,) = _ones(server)
        _until(lambda: one.rests and one.conn.their_state is h11.IDLE)
        _until(lambda: one._phase != "rest")
        assert _ok(client)
        assert len(server.server_state.connections) == 1


def test_the_body_of_a_request_that_came_with_the_one_before_has_its_time() -> None:
    with _serving() as (port, server), _connect(port) as client:
        client.sendall(GET + CHUNKED.replace(b" / ", b" /never "))
        _until(lambda: _busy(server) and _ones(server)[0].conn.their_state is h11.SEND_BODY)
        client.settimeout(1.0)
        assert not _is_closed(client)
        assert len(server.server_state.connections) == 1


def test_a_client_that_takes_nothing_loses_its_connection() -> None:
    with _serving() as (port, server), _connect(port) as client:
        client.sendall(GET.replace(b" / ", b" /much "))
        _until(lambda: _busy(server))
        _until(lambda: not server.server_state.connections)
        with _connect(port) as other:  # one that takes it gets all
            assert _ok(other, b"/much")
            got, piece = 0, b""
            while not piece.endswith(b"0\r\n\r\n"):
                piece = other.recv(1 << 20)
                got += len(piece)
            assert got > 400 << 16


@pytest.mark.parametrize("most", [32 << 10, 1 << 20])
def test_the_kernel_keeps_little_of_an_answer(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(connections, "STALL_SECONDS", 60.0)
    monkeypatch.setattr(connections, "SEND_BYTES", most)
    with _serving() as (port, server), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        client.connect(("127.0.0.1", port))
        client.sendall(GET.replace(b" / ", b" /much "))
        _until(lambda: _busy(server) and _ones(server)[0].flow.write_paused)
        descriptor = _ones(server)[0].transport.get_extra_info("socket").fileno()
        (kept,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
        assert (kept < 128 << 10) == (most < 128 << 10)


def test_one_connection_too_many_closes_the_one_that_rests_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 60.0)
    with _serving(most=3) as (port, server), contextlib.ExitStack() as stack:
        busy = stack.enter_context(_connect(port))
        busy.sendall(GET.replace(b" / ", b" /never "))
        _until(lambda: _busy(server))
        resting = []
        for number in range(2, 4):
            resting.append(stack.enter_context(_connect(port)))
            _until(lambda number=number: len(_ones(server)) == number)  # type: ignore[misc]
        newest = stack.enter_context(_connect(port))
        assert _is_closed(resting[0])
        assert _ok(newest)
        assert _ok(resting[1])
        busy.settimeout(0.2)
        assert not _is_closed(busy)
        assert len(server.server_state.connections) == 3


def test_where_all_are_busy_the_newest_is_closed() -> None:
    with _serving(most=1) as (port, server), _connect(port) as busy:
        busy.sendall(GET.replace(b" / ", b" /never "))
        _until(lambda: _busy(server))
        with _connect(port) as newest:
            assert _is_closed(newest)
        busy.settimeout(0.2)
        assert not _is_closed(busy)
