"""The event loop of a process that is otherwise synchronous: one thread, which drives all of its streams."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from isthmus.common.errors import LocalProtocolError

T = TypeVar("T")

# Called again and again while a wait lasts; what it raises ends the wait.
Check = Callable[[], None]

CHECK_SECONDS = 0.25
"""Between two looks at whether a wait is still wanted."""
EXIT_SECONDS = 2.0
"""That the process waits, when it ends, for what still runs on the loop."""


class EventLoop:
    """An event loop on a thread of its own, until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="isthmus-rpc", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def run(self, work: Coroutine[Any, Any, T], check: Check = lambda: None) -> T:
        """Have a coroutine run on the loop, and wait for what it returns or raises.

        Whatever ends the wait before, Ctrl-C or what `check` raises, cancels the coroutine.

        Raises:
            LocalProtocolError: this process is a fork of the one that has the loop.
        """
        if os.getpid() != self._process or threading.current_thread() is self._thread:
            work.close()
            raise LocalProtocolError(
                "a connection to a cloud cannot be used in a forked process, nor in a callback of its own: start "
                "processes by `spawn`, and connect there"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                check()
                try:
                    return future.result(CHECK_SECONDS)
                except TimeoutError:
                    if future.done():  # it is the coroutine's own, or it was done just now
                        return future.result()
        except BaseException:
            future.cancel()  # harmless where it is done
            raise

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._stop_wait())

    async def _stop_wait(self) -> None:
        await self._stop.wait()

    def _end(self) -> None:
        if os.getpid() == self._process:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(EXIT_SECONDS)


_lock = threading.Lock()
_loop: EventLoop | None = None


def run(work: Coroutine[Any, Any, T], check: Check = lambda: None) -> T:
    """Have a coroutine run on the process's event loop; see `EventLoop.run`."""
    return (_loop or _start()).run(work, check)


def _start() -> EventLoop:
    global _loop  # noqa: PLW0603  # one for the process: gRPC wakes every loop there is for each event of any
    with _lock:
        _loop = _loop or EventLoop()
        return _loop
