"""The clients of `isthmus bench daemon`, in a process of their own that gives way to all others (nice 19).

    polling   connections that stay open, over which status, jobs, models, files and the page are asked
    slow      heads that come a byte at a time, half of them without an end; a file's content and a stream of an
              answer's tokens that are asked for and not read
    bodies    bodies that are too large, with and without a length, and broken ones: JSON, multipart, zstd, HTTP itself
    tokens    wrong tokens, none, another Host, another Origin

The task names `case`, `host`, `port`, `token`, `model` and `clients`. The process is told to stop by its next question,
and says then what `Clients.counts` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.processes import Parent, serve

MODULE: Final = "isthmus.experiments.daemon.daemon_load"
LOWEST = 19  # priority
PER_SECOND = 20.0
"""Requests of all clients together: each of 200 asks every ten seconds, as pages and scripts do that watch a job."""
WAIT_SECONDS = 30.0
"""A client gives up then, which is twice as long as the daemon gives a head to come."""
PATHS = ("/isthmus/v1/status", "/v1/fine_tuning/jobs", "/v1/models", "/v1/files", "/isthmus/v1/jobs", "/")
HUGE = 64 << 20
"""Bytes that a body claims to have, or that are sent unless the daemon closes the connection before."""
PIECE = 64 << 10
FILE_BYTES = 8 << 20
"""Of the file that slow clients ask for: more than the kernel keeps of an answer, so that the daemon has the rest."""
RECEIVED = 64 << 10
"""Bytes that the kernel keeps for a client that does not read."""
JSON_TYPE = {"Content-Type": "application/json"}
FORM_TYPE = {"Content-Type": "multipart/form-data; boundary=x"}
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Clients:
    """All clients of a case.

    Attributes:
        statuses: How many requests were answered with each of HTTP's statuses.
        closed: Requests that ended without an answer, since the daemon closed the connection.
        timeouts: Requests that a client gave up.
        most_open: Connections that were open at the same time, at most.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.statuses: Counter[int] = Counter()
        self.closed = self.timeouts = self.most_open = 0
        self._host, self._port, self._token, self._model = (task[name] for name in ("host", "port", "token", "model"))
        self._number: int = task["clients"]
        self._open = 0
        self._file = ""
        self._random = random.Random(0)  # noqa: S311  # a load, not a secret

    def counts(self) -> dict[str, Any]:
        """The attributes, as JSON can say them."""
        statuses = {str(status): count for status, count in sorted(self.statuses.items())}
        names = ("closed", "timeouts", "most_open")
        return {"statuses": statuses, **{name: getattr(self, name) for name in names}}

    async def run(self, case: str, stopped: asyncio.Event) -> None:
        """Ask until `stopped`. Raises IsthmusError where the daemon does not take the file of the slow clients."""
        if case == "slow":
            self._file = await self._upload()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._again(CASES[case], number)) for number in range(self._number)]
            await stopped.wait()
            for task in tasks:
                task.cancel()

    async def _again(self, client: Client, number: int) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._random.uniform(0, self._pause())
        for turn in itertools.count():
            await asyncio.sleep(due - loop.time())
            # Clients that hold their connections go on at once, unless the daemon takes none.
            due = loop.time() + self._pause() * (0.1 if client in HOLDING else 1)
            try:
                await client(self, number, turn)
            except TimeoutError:
                self.timeouts += 1
            except (OSError, asyncio.IncompleteReadError):
                self.closed += 1

    def _pause(self) -> float:
        """Seconds from one request of a client to its next one."""
        return self._random.uniform(0.5, 1.5) * self._number / PER_SECOND

    async def polling(self, number: int, turn: int) -> None:
        """Requests over one connection, without an end."""
        async with self._connection() as (reader, writer):
            for again in itertools.count(number + turn):
                writer.write(self._head("GET", PATHS[again % len(PATHS)]))
                await self._answer(reader)
                await asyncio.sleep(self._pause())

    async def slow(self, number: int, turn: int) -> None:
        """A head that comes slowly, or an answer that is not read."""
        kind = (number + turn) % 4
        status = self._head("GET", "/isthmus/v1/status")
        async with self._connection() as (reader, writer):
            if kind == 0:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._drip(writer, itertools.cycle(b"a"), 0.5)
            elif kind == 1:
                await self._drip(writer, status, self._pause() / 2 / len(status))
                await self._answer(reader)
            else:
                # What a stream costs is what computing its answer costs, so there is one at a time.
                writer.write(self._stream() if not number else self._head("GET", f"/v1/files/{self._file}/content"))
                async with asyncio.timeout(WAIT_SECONDS):
                    found, _ = await _start(reader)
                await asyncio.sleep(self._pause())
                self.statuses[found] += 1

    async def bodies(self, number: int, turn: int) -> None:
        """A body that is too large or broken."""
        kind = (number + turn) % 7
        huge = {**JSON_TYPE, "Content-Length": str(HUGE)}
        if kind == 0:
            await self._send("POST", "/v1/chat/completions", huge, b" " * 4096)
        elif kind == 1:
            await self._flood(huge, b" " * PIECE)
        elif kind == 2:
            await self._flood({**JSON_TYPE, "Transfer-Encoding": "chunked"}, b"%x\r\n%b\r\n" % (PIECE, b" " * PIECE))
        elif kind == 3:
            await self._sized("POST", "/v1/fine_tuning/jobs", JSON_TYPE, b"[" * 100_000)
        elif kind == 4:
            part = b'--x\r\nContent-Disposition: form-data; name="file"\r\n'
            await self._sized("POST", "/v1/files", FORM_TYPE, part * 99)
        elif kind == 5:
            packed = {"Content-Type": "application/x-protobuf", "Content-Encoding": "zstd"}
            await self._sized("POST", "/api/v1/forward_backward", packed, self._random.randbytes(4096))
        else:
            await self._send("\x00\x7f", "nothing HTTP/9", {}, b"\xff" * 512)

    async def tokens(self, number: int, turn: int) -> None:
        """Who is nobody, or calls the daemon by another name."""
        token = f"tml-{self._random.randbytes(24).hex()}"
        headers: tuple[dict[str, str | None], ...] = (
            {"Authorization": f"Bearer {token}"},
            {"Authorization": None, "X-API-Key": token},
            {"Authorization": None},
            {"Host": "attacker.example"},
            {"Origin": "https://attacker.example"},
        )
        await self._send("GET", "/v1/files", headers[(number + turn) % len(headers)], b"")

    async def _upload(self) -> str:
        """The id of a file that is large enough."""
        part = b"--x\r\nContent-Disposition: form-data; name=%b\r\n\r\n%b\r\n"
        form = part % (b"purpose", b"user_data") + part % (b"file; filename=slow", bytes(FILE_BYTES)) + b"--x--\r\n"
        answer = await self._sized("POST", "/v1/files", FORM_TYPE, form)
        if self.statuses != {200: 1}:
            raise IsthmusError(f"the daemon does not take a file of {FILE_BYTES} bytes: {answer[:200]!r}")
        return str(json.loads(answer)["id"])

    async def _flood(self, headers: dict[str, str], piece: bytes) -> None:
        """A body that goes on, whatever is answered, until the daemon closes the connection."""
        async with asyncio.timeout(WAIT_SECONDS), self._connection() as (reader, writer):
            writer.write(self._head("POST", "/v1/completions", headers))
            answer = asyncio.create_task(_whole(reader))
            try:
                with contextlib.suppress(ConnectionError):
                    for _ in range(HUGE // PIECE):
                        writer.write(piece)
                        await writer.drain()
                status, _ = await answer
            finally:
                answer.cancel()
            self.statuses[status] += 1

    async def _drip(self, writer: asyncio.StreamWriter, data: Iterable[int], seconds: float) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(seconds)

    async def _sized(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        return await self._send(method, path, {**headers, "Content-Length": str(len(body))}, body)

    async def _send(self, method: str, path: str, headers: dict[str, Any], body: bytes) -> bytes:
        async with self._connection() as (reader, writer):
            writer.write(self._head(method, path, headers) + body)
            return await self._answer(reader)

    def _stream(self) -> bytes:
        """Asks for a short answer, with as much beside each token as there can be."""
        asked = {"model": self._model, "prompt": "Once", "max_tokens": 4, "stream": True, "logprobs": 5}
        body = json.dumps(asked).encode()
        return self._head("POST", "/v1/completions", {**JSON_TYPE, "Content-Length": str(len(body))}) + body

    def _head(self, method: str, path: str, headers: dict[str, Any] | None = None) -> bytes:
        """The head of a request; a header that is None is left out."""
        own = {"Host": f"{self._host}:{self._port}", "Authorization": f"Bearer {self._token}", **(headers or {})}
        given = [f"{name}: {value}" for name, value in own.items() if value is not None]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *given, "", ""]).encode("latin-1")

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Streams]:
        """A connection, which is counted while it is open."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED)
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            yield reader, writer
        finally:
            self._open -= 1
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        """The body of an answer, whose status is counted."""
        async with asyncio.timeout(WAIT_SECONDS):
            status, body = await _whole(reader)
        self.statuses[status] += 1
        return body


async def _whole(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of an answer; no body where its length is not said."""
    status, length = await _start(reader)
    return status, await reader.readexactly(length)


async def _start(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Status and length of an answer, whose head is read."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines if line)
    return int(first.split(b" ")[1]), int(headers.get(b"content-length", 0))


Client = Callable[[Clients, int, int], Awaitable[None]]
CASES: Final[dict[str, Client]] = {
    "polling": Clients.polling,
    "slow": Clients.slow,
    "bodies": Clients.bodies,
    "tokens": Clients.tokens,
}


HOLDING: Final = (Clients.polling, Clients.slow)


async def _load(parent: Parent) -> dict[str, Any]:
    clients, stopped = Clients(parent.task), asyncio.Event()
    asking = asyncio.get_running_loop().run_in_executor(None, parent.question)
    asking.add_done_callback(lambda _: stopped.set())
    begun = time.process_time()
    await clients.run(parent.task["case"], stopped)
    return {**clients.counts(), "cpu_s": time.process_time() - begun}


def main(parent: Parent) -> None:
    """Ask until the parent says that it is enough."""
    os.nice(LOWEST)
    parent.say("ready")
    parent.say(asyncio.run(_load(parent)))


if __name__ == "__main__":
    serve(main)
