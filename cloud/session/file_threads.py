"""Threads that read, write and hash files for edges and count tokens, so that a disk keeps no computation waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from isthmus.common.torch_threads import set_torch_threads
from isthmus.protocol import messages as m

R = TypeVar("R")

FILE_THREADS = 4
"""Tenants whose files are read, written or hashed at a time: more would only take turns at the disk."""

FILE_MESSAGES = (m.Fetch, m.FetchList, m.Put, m.PlugIn)
"""Messages that are answered from files."""


@dataclass(slots=True)
class _Turn:
    """A tenant's turn, and how much of the tenant's work has it or waits for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    work: int = 0


class FileThreads:
    """The threads. A tenant has one at a time, so that one tenant's uploads do not keep others' downloads waiting.

    Adapters are checked one at a time, on a thread of their own: a check takes seconds, and loading an adapter changes
    state that belongs to the whole process. For the server's event loop alone, where nothing else is said.
    """

    def __init__(self) -> None:
        self._files = ThreadPoolExecutor(FILE_THREADS, "files")
        # A check computes the edge's own layers beside the compute threads, so it has one torch thread.
        self._checks = ThreadPoolExecutor(1, "checks", initializer=set_torch_threads, initargs=(1,))
        self._turns: dict[bytes, _Turn] = {}  # by tenant

    async def run(self, tenant: bytes, work: Callable[[], R], over: Callable[[], None], *, check: bool = False) -> R:
        """Do work on a thread, after the same tenant's earlier work.

        Args:
            tenant: whose work it is: the digest of the key's fingerprint.
            work: what is done. Work that has begun goes on to its end, also where nobody waits for it any more.
            over: called once the work has ended, or will not begin.
            check: whether the work checks an adapter.

        Raises:
            RuntimeError: the threads are ending.
        """
        turn = self._turns.setdefault(tenant, _Turn())
        turn.work += 1
        try:
            await turn.lock.acquire()
        except BaseException:
            over()
            self._leave(tenant)
            raise
        try:
            done = (self._checks if check else self._files).submit(work)
        except BaseException:
            over()
            self._end(tenant)
            raise
        loop = asyncio.get_running_loop()

        def ended(_: Future[R]) -> None:  # the turn ends with the work, which may outlive whoever waited for it
            over()
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(self._end, tenant)

        done.add_done_callback(ended)
        return await asyncio.wrap_future(done)

    def shutdown(self) -> None:
        """Take no more work. May be called from any thread."""
        for pool in (self._files, self._checks):
            pool.shutdown(wait=False, cancel_futures=True)

    def _end(self, tenant: bytes) -> None:
        self._turns[tenant].lock.release()
        self._leave(tenant)

    def _leave(self, tenant: bytes) -> None:
        turn = self._turns[tenant]
        turn.work -= 1
        if not turn.work:
            del self._turns[tenant]
