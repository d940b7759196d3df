"""A TCP relay that breaks connections on command, so that a fault falls exactly where it was meant to.

The relay stands between an edge and a cloud and copies bytes both ways. It can be asked to reset every connection now,
or after an exact number of further bytes in one direction (in the middle of a tensor, say), to hold one direction back,
so that an answer cannot overtake a fault, and to reset whatever connects. A reset is a real one: the sockets are closed
with SO_LINGER 0, which sends RST and throws away what is still in their buffers.

Everything runs on one event loop in a thread of its own; the methods are called from other threads and return when the
relay has done it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

Direction = Literal["up", "down"]  # up: from the edge to the cloud

CHUNK = 1 << 16  # bytes copied at once
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 seconds

T = TypeVar("T")


class Relay:
    """Relays an address of this machine to a target.

    Args:
        listen: host and port of its own; port 0 is any free one.

    Attributes:
        port: on which it listens.
    """

    def __init__(self, host: str, port: int, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self._target, self._listen = (host, port), listen
        self._budget: dict[Direction, int | None] = {"up": None, "down": None}  # bytes until a cut
        self._allowed: dict[Direction, int | None] = {"up": None, "down": None}  # bytes until nothing passes
        self._released = asyncio.Event()
        self._bytes: dict[Direction, int] = {"up": 0, "down": 0}
        self._refuse_until = 0.0  # on the loop's clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._passed = threading.Condition()
        self.port = 0

    def bytes_passed(self, direction: Direction) -> int:
        """Bytes copied in one direction so far, over all connections."""
        return self._bytes[direction]

    def wait_passed(self, direction: Direction, total: int, timeout: float) -> bool:
        """Wait until `total` bytes were copied since the start; False if that takes more than `timeout` seconds."""
        with self._passed:
            return self._passed.wait_for(lambda: self._bytes[direction] >= total, timeout)

    def point_at(self, host: str, port: int) -> None:
        """Send new connections to another target."""
        self._do(lambda: setattr(self, "_target", (host, port)))

    def cut(self) -> None:
        """Reset every connection now; what was held back is lost with them."""
        self._do(self._cut)

    def cut_after(self, count: int, direction: Direction) -> None:
        """Reset every connection once `count` more bytes (at least 1) were copied in one direction."""
        self._do(lambda: self._budget.__setitem__(direction, count))

    def hold_after(self, count: int, direction: Direction) -> None:
        """Let `count` more bytes pass in one direction, and no more until `release` or a cut."""
        self._do(lambda: self._allowed.__setitem__(direction, count))

    def release(self) -> None:
        """Let everything pass again that `hold_after` holds back, or would."""
        self._do(self._release)

    def refuse_for(self, seconds: float) -> None:
        """Reset whatever connects during the next seconds."""
        self._do(lambda: setattr(self, "_refuse_until", self._loop.time() + seconds))

    def disarm(self) -> None:
        """Forget `cut_after` and `refuse_for`."""

        def forget() -> None:
            self._budget = {"up": None, "down": None}
            self._refuse_until = 0.0

        self._do(forget)

    def __enter__(self) -> Relay:
        self._thread.start()
        self._server = self._wait(asyncio.start_server(self._accept, *self._listen, limit=CHUNK))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until both of its directions have ended."""
        if self._loop.time() < self._refuse_until:
            _reset(writer)
            return
        self._writers.add(writer)  # a cut also meets a connection whose other half is only being made
        try:
            try:
                other_reader, other_writer = await asyncio.open_connection(*self._target, limit=CHUNK)
            except OSError:
                _reset(writer)
                return
            if writer.transport.is_closing():
                _reset(other_writer)
                return
            self._writers.add(other_writer)
            try:
                await asyncio.gather(self._pump(reader, other_writer, "up"), self._pump(other_reader, writer, "down"))
            finally:
                self._writers.discard(other_writer)
                other_writer.close()
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        with contextlib.suppress(OSError):  # either end broke: the other one hears of it below
            while chunk := await reader.read(CHUNK):
                while chunk:
                    while self._allowed[direction] == 0:
                        self._released.clear()
                        await self._released.wait()
                    if writer.transport.is_closing():
                        break
                    count = self._spend(len(chunk), direction)
                    writer.write(chunk[:count])
                    chunk = chunk[count:]
                    await writer.drain()
                    self._count(direction, count)
                    if self._budget[direction] == 0:
                        self._budget[direction] = None
                        self._cut()
            if writer.can_write_eof() and not writer.transport.is_closing():
                writer.write_eof()
            return
        _reset(writer)

    def _spend(self, size: int, direction: Direction) -> int:
        """How many of the next bytes pass; they are taken from what is allowed and left."""
        allowed, budget = self._allowed[direction], self._budget[direction]
        count = min(limit for limit in (size, allowed, budget) if limit is not None)
        if allowed is not None:
            self._allowed[direction] = allowed - count
        if budget is not None:
            self._budget[direction] = budget - count
        return count

    def _release(self) -> None:
        self._allowed = {"up": None, "down": None}
        self._released.set()

    def _count(self, direction: Direction, count: int) -> None:
        with self._passed:
            self._bytes[direction] += count
            self._passed.notify_all()

    def _cut(self) -> None:
        for writer in tuple(self._writers):
            _reset(writer)
        self._release()

    def _do(self, work: Callable[[], None]) -> None:
        async def run() -> None:
            work()

        self._wait(run())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _reset(writer: asyncio.StreamWriter) -> None:
    if not writer.transport.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
