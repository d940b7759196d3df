"""What reads and writes files for edges: on threads of its own, so that a download keeps no computing waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from isthmus.protocol import messages as m

R = TypeVar("R")

FILE_THREADS = 4
"""Tenants whose files are read, written, hashed or checked at a time."""

FILE_MESSAGES = (m.Fetch, m.FetchList, m.Put, m.PlugIn)
"""What is answered from files."""


class FileWork:
    """The threads. A tenant has one at a time, so that one tenant's uploads do not keep others' downloads waiting.

    Adapters are checked one at a time, on a thread for that alone: a check takes seconds, and what it loads them with
    changes things that belong to the process. For the server's event loop alone, where nothing else is said.
    """

    def __init__(self) -> None:
        # A check computes with the edge's own layers: beside the compute threads, not in their place.
        self._files = ThreadPoolExecutor(FILE_THREADS, "files")
        self._checks = ThreadPoolExecutor(1, "checks", initializer=torch.set_num_threads, initargs=(1,))
        self._turns: dict[bytes, tuple[asyncio.Lock, int]] = {}  # by tenant: its turn, and how many want it

    async def run(self, tenant: bytes, work: Callable[[], R], over: Callable[[], None], *, check: bool = False) -> R:
        """Have something done on a thread, after what the same tenant wanted before.

        Args:
            tenant: Whose work it is: the digest of the key's fingerprint.
            work: What is done. Where nobody waits any more, what has begun goes on to its end.
            over: Called once it is done, or will not be.
            check: Whether it checks an adapter.

        Raises:
            RuntimeError: The threads are ending.
        """
        turn, wanted = self._turns.get(tenant, (asyncio.Lock(), 0))
        self._turns[tenant] = turn, wanted + 1
        try:
            await turn.acquire()
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

        def ended(_: Future[R]) -> None:  # a thread that still works for somebody who is gone is this tenant's
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
        self._turns[tenant][0].release()
        self._leave(tenant)

    def _leave(self, tenant: bytes) -> None:
        turn, wanted = self._turns[tenant]
        if wanted == 1:
            del self._turns[tenant]
        else:
            self._turns[tenant] = turn, wanted - 1
