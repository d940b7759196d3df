"""The clients of `isthmus bench daemon`, in a process of their own that gives way to all others (nice 19).

    polling   200 clients with connections that stay open ask 20 times a second together: status, jobs, models, events
    slow      200 clients send a header a byte at a time, or ask for much and hardly read
    bodies    bodies that are too large, with and without a length, and broken ones: JSON, multipart, zstd, HTTP itself
    tokens    wrong tokens, none, another Host, another Origin

The task names `case`, `host`, `port`, `token` and `clients`. The process is told to stop by its next question, and says
how many requests it made and what came of them, by HTTP's status; 0 is a connection that the daemon closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from isthmus.experiments.harness.processes import Parent, serve

MODULE: Final = "isthmus.experiments.daemon.daemon_load"
LOWEST = 19  # priority
PER_SECOND = 20.0
"""Requests of all clients together."""
WAIT_SECONDS = 30.0
PATHS = ("/isthmus/v1/status", "/v1/fine_tuning/jobs", "/v1/models", "/v1/files", "/isthmus/v1/jobs", "/")
HUGE = 64 * 1024 * 1024  # bytes that a body claims, or that are sent until the daemon has had enough


class Clients:
    """All clients of a case.

    Attributes:
        found: How many requests ended with each status.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.found: Counter[int] = Counter()
        self._host, self._port, self._token = task["host"], task["port"], task["token"]
        self._number = task["clients"]
        self._random = random.Random(0)  # noqa: S311  # a load, not a secret

    async def run(self, case: str, stopped: asyncio.Event) -> None:
        """Ask until `stopped`."""
        client = CASES[case]
        tasks = [asyncio.create_task(self._again(client, number, stopped)) for number in range(self._number)]
        await stopped.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self, client: Client, number: int, stopped: asyncio.Event) -> None:
        pause = self._number / PER_SECOND
        await asyncio.sleep(self._random.uniform(0, pause))
        for turn in itertools.count():
            if stopped.is_set():
                return
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
                await client(self, number, turn)
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * pause)

    async def polling(self, number: int, turn: int) -> None:
        """Ten requests over one connection, with their share of pauses between."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            for again in range(10):
                path = PATHS[(number + turn + again) % len(PATHS)]
                writer.write(self._head("GET", path))
                await self._answer(reader, writer)
                await asyncio.sleep(self._number / PER_SECOND)
        finally:
            writer.close()

    async def slow(self, number: int, turn: int) -> None:
        """A header that comes a byte at a time, or an answer that is hardly read."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            if (number + turn) % 2:
                for byte in self._head("GET", "/isthmus/v1/status"):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.5)
                await self._answer(reader, writer)
            else:
                for _ in range(200):
                    writer.write(self._head("GET", "/"))
                await asyncio.sleep(WAIT_SECONDS)
                self.found[0] += 1
        finally:
            writer.close()

    async def bodies(self, number: int, turn: int) -> None:
        """A body that is too large or broken."""
        kind = (number + turn) % 6
        json_type = {"Content-Type": "application/json"}
        if kind == 0:
            await self._send("POST", "/v1/chat/completions", {**json_type, "Content-Length": str(HUGE)}, b" " * 4096)
        elif kind == 1:
            await self._flood()
        elif kind == 2:
            await self._sized("POST", "/v1/fine_tuning/jobs", json_type, b"[" * 100_000)
        elif kind == 3:
            form = {"Content-Type": "multipart/form-data; boundary=x"}
            await self._sized("POST", "/v1/files", form, b'--x\r\nContent-Disposition: form-data; name="file"\r\n' * 99)
        elif kind == 4:
            packed = {"Content-Type": "application/x-protobuf", "Content-Encoding": "zstd"}
            await self._sized("POST", "/api/v1/forward_backward", packed, self._random.randbytes(4096))
        else:
            await self._send("\x00\x7f", "nothing HTTP/9", {}, b"\xff" * 512)

    async def tokens(self, number: int, turn: int) -> None:
        """Who is nobody, or calls the daemon by another name."""
        kind = (number + turn) % 4
        token = f"tml-{self._random.randbytes(24).hex()}"
        headers: dict[str, str] = (
            {"Authorization": f"Bearer {token}"},
            {"X-API-Key": token},
            {"Authorization": f"Bearer {self._token}", "Host": "attacker.example"},
            {"Authorization": f"Bearer {self._token}", "Origin": "https://attacker.example"},
        )[kind]
        await self._send("GET", "/v1/files", headers, b"")

    async def _flood(self) -> None:
        """A body without a length, until the daemon has had enough."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._head("POST", "/v1/completions", {"Transfer-Encoding": "chunked"}))
            chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
            with contextlib.suppress(ConnectionError):
                for _ in range(HUGE // 65536):
                    writer.write(chunk)
                    await writer.drain()
                    if reader.at_eof():
                        break
            await self._answer(reader, writer)
        finally:
            writer.close()

    async def _sized(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        await self._send(method, path, {**headers, "Content-Length": str(len(body))}, body)

    async def _send(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._head(method, path, headers) + body)
            await self._answer(reader, writer)
        finally:
            writer.close()

    def _head(self, method: str, path: str, headers: dict[str, str] | None = None) -> bytes:
        own = {"Host": f"{self._host}:{self._port}", "Authorization": f"Bearer {self._token}", **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in own.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read an answer, and count its status."""
        status = 0
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                if lengths:
                    await reader.readexactly(int(lengths[0].partition(b":")[2]))
        finally:
            self.found[status] += 1


Client = Callable[[Clients, int, int], Awaitable[None]]
CASES: Final[dict[str, Client]] = {
    "polling": Clients.polling,
    "slow": Clients.slow,
    "bodies": Clients.bodies,
    "tokens": Clients.tokens,
}


async def _load(parent: Parent) -> dict[str, int]:
    clients, stopped = Clients(parent.task), asyncio.Event()
    loop = asyncio.get_running_loop()
    waiting = loop.run_in_executor(None, parent.question)
    waiting.add_done_callback(lambda _: stopped.set())
    await clients.run(parent.task["case"], stopped)
    return {str(status): count for status, count in clients.found.items()}


def main(parent: Parent) -> None:
    """Ask until the parent says that it is enough."""
    os.nice(LOWEST)
    parent.say("ready")
    parent.say(asyncio.run(_load(parent)))


if __name__ == "__main__":
    serve(main)
