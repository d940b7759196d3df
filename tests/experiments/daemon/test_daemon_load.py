"""The clients that load a daemon: what they send, and how they count what comes of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from isthmus.common.errors import IsthmusError
from isthmus.experiments.daemon import daemon_load
from isthmus.experiments.daemon.daemon_load import CASES, FILE_BYTES, Clients

NUMBER = 8
HEAD_SECONDS = 2.0


class Server:
    """Answers requests by a function of their heads; it closes a connection whose head does not come in time.

    Attributes:
        heads: Of all requests.
        most_open: Connections at the same time.
    """

    def __init__(self, answer: Answer) -> None:
        self.heads: list[str] = []
        self.most_open = self._open = 0
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            while True:
                async with asyncio.timeout(HEAD_SECONDS):
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.heads.append(head)
                await self._answer(head, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone, or is ended
        finally:
            self._open -= 1
            writer.transport.abort()


Answer = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def says(status: int, body: bytes = b'{"id": "file-1"}') -> Answer:
    """Takes a body that has a length, and answers."""

    async def answer(head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lengths = [line.split(": ")[1] for line in head.split("\r\n") if line.startswith("Content-Length")]
        await reader.readexactly(int(lengths[0]) if lengths else 0)
        writer.write(b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
        await writer.drain()

    return answer


async def closes(_head: str, _reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    raise ConnectionAbortedError


async def says_nothing(_head: str, _reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


def load(case: str, answer: Answer, done: Callable[[Clients, Server], bool]) -> tuple[Clients, Server]:
    """Let clients ask until `done`."""

    async def run() -> tuple[Clients, Server]:
        server = Server(answer)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        task = {"host": "127.0.0.1", "port": port, "token": "tml-right", "model": "m", "clients": NUMBER}
        clients, stopped = Clients(task), asyncio.Event()
        running = asyncio.create_task(clients.run(case, stopped))
        async with asyncio.timeout(60):
            while not done(clients, server) and not running.done():
                await asyncio.sleep(0.01)
        stopped.set()
        try:
            await running
        finally:
            listening.close()
        return clients, server

    return asyncio.run(run())


def count(clients: Clients) -> int:
    return clients.statuses.total() + clients.closed + clients.timeouts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("status", [200, 500])
def test_answers_are_counted_by_their_status(case: str, status: int) -> None:
    async def answer(head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await says(200 if head.startswith("POST /v1/files") else status)(head, reader, writer)

    clients, server = load(case, answer, lambda clients, _: clients.statuses[status] >= 4)
    assert set(clients.counts()["statuses"]) <= {"200", str(status)}
    assert len(server.heads) >= 4


def test_what_the_daemon_closes_is_not_what_a_client_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, _ = load("tokens", closes, lambda clients, _: count(clients) >= 5)
    assert (clients.timeouts, clients.statuses) == (0, Counter())
    monkeypatch.setattr(daemon_load, "WAIT_SECONDS", 0.1)
    clients, _ = load("tokens", says_nothing, lambda clients, _: count(clients) >= 5)
    assert (clients.closed, clients.statuses) == (0, Counter())


def test_what_is_under_way_at_the_end_counts_as_nothing() -> None:
    clients, _ = load("tokens", says_nothing, lambda _, server: len(server.heads) >= NUMBER)
    assert count(clients) == 0


@pytest.mark.parametrize("case", ["polling", "slow"])
def test_all_connections_are_open_together(case: str) -> None:
    clients, _ = load(case, says(200), lambda _, server: server.most_open == NUMBER)
    assert clients.most_open == NUMBER
    clients, _ = load(case, says(200), lambda _, server: server.most_open == 1)
    assert clients.most_open < NUMBER  # as not all have begun


def test_slow_clients_hold_heads_without_an_end_and_answers_that_they_do_not_read() -> None:
    sent: list[str] = []

    async def answer(head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_content = "/content " in head
        await says(200, bytes(FILE_BYTES) if is_content else b'{"id": "file-1"}')(head, reader, writer)
        sent.append("content" if is_content else "other")

    def done(clients: Clients, server: Server) -> bool:
        kinds = [sum(words in head for head in server.heads) for words in ("/content ", '"stream": true', "/status ")]
        return bool(clients.closed) and min(kinds[0], kinds[2]) > 3

    clients, _ = load("slow", answer, done)
    assert clients.statuses[200] > 3
    assert "other" in sent
    assert "content" not in sent


def test_slow_clients_need_their_file() -> None:
    with pytest.raises(IsthmusError, match=r"does not take a file of 8388608 bytes: b'no room'"):
        load("slow", says(507, b"no room"), lambda *_: False)


@pytest.mark.parametrize("ends", [True, False])
def test_a_flood_goes_on_until_it_is_ended(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    monkeypatch.setattr(daemon_load, "HUGE", 16 << 20)
    got: list[int] = []

    async def answer(head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if "chunked" not in head:
            raise ConnectionAbortedError
        writer.write(b"HTTP/1.1 413 x\r\ncontent-length: 2\r\n\r\nno")
        got.append(0)
        while piece := await reader.read(1 << 16):
            got[-1] += len(piece)
            if ends and got[-1] > 1 << 20:
                raise ConnectionAbortedError

    clients, _ = load("bodies", answer, lambda clients, _: clients.statuses[413] >= 3)
    assert set(clients.statuses) == {413}
    assert all(each < 2 << 20 for each in got) == ends


def test_no_wrong_request_is_one_that_is_let_in() -> None:
    _, server = load("tokens", says(401), lambda _, server: len(server.heads) >= 30)
    kinds = set()
    for head in server.heads:
        wrong = ("tml-right" not in head, "attacker.example\r\n" in head)
        assert any(wrong)
        kinds.add((*wrong, "Origin" in head, "Authorization" in head, "X-API-Key" in head))
    assert len(kinds) == 5
