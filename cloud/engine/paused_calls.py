"""Calls that pause: a computation on a thread of its own that asks questions and waits for the answers.

The span's layers are transformers' code and autograd's engine; neither can be left in the middle and entered again. A
thread can. It and the one that drives it take turns, so there is never more than one of them that computes: what
belongs to the compute thread stays as safe as if there were no other. A call that asks nothing ends in its first turn.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, cast

from isthmus.common.torch_threads import set_torch_threads

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")


class Abandoned(BaseException):
    """Raised inside a call whose session is over."""


class CallThread:
    """A thread for one call of a tenant, from when it is claimed until it is given back, which has to be done once.

    Attributes:
        tenant: Whose.
        nbytes: Memory that the call takes until it ends.
        ready: Done when the thread is there.
    """

    def __init__(self, threads: CallThreads, tenant: str, nbytes: int) -> None:
        self.tenant, self.nbytes = tenant, nbytes
        self.ready = Future[None]()
        self._threads = threads

    def start(self, work: Callable[[], None]) -> None:
        """Run `work`, which raises nothing and gives the thread back at its end."""
        self._threads.run(work)

    def give_back(self) -> None:
        """Leave the thread to others, or wait for it no longer."""
        self._threads.take_back(self)


class CallThreads:
    """Threads for calls that pause, of which a tenant has no more than it leaves free, and memory likewise.

    So there is one for a tenant that comes later, however long the calls of those before it last. A call that waits for
    memory of other tenants only keeps what is free from those behind it: small ones do not keep a large one out. All
    may be asked from any thread.

    Args:
        threads: torch threads of each, as bits depend on it.
        limit: Calls of all sessions that may have begun and not ended.
        nbytes: What all calls that have begun may take together until they end.
    """

    def __init__(self, threads: int, limit: int, nbytes: float = math.inf) -> None:
        self._nbytes, self._free_bytes = nbytes, nbytes
        self._held_bytes: Counter[str] = Counter()  # by tenant
        self._pool = ThreadPoolExecutor(limit, "call", initializer=set_torch_threads, initargs=(threads,))
        self._books = threading.Lock()
        self._free = limit
        self._held: Counter[str] = Counter()  # by tenant
        self._waiting: list[CallThread] = []

    def claim(self, tenant: str, nbytes: int = 0) -> CallThread:
        """A thread, which is there at once or after those that were claimed before it and can be had.

        Args:
            tenant: Whose.
            nbytes: What the call takes until it ends.

        Raises:
            ValueError: It takes more than a tenant may have, which is half of what all may.
        """
        if nbytes > self._nbytes / 2:
            raise ValueError(
                f"a call that may pause takes about {nbytes} bytes of memory, and this cloud computes within "
                f"{self._nbytes:.0f}, half of it for one that may pause: send fewer or shorter sequences at a time"
            )
        thread = CallThread(self, tenant, nbytes)
        with self._books:
            self._waiting.append(thread)
            self._hand_out()
        return thread

    def take_back(self, thread: CallThread) -> None:
        """See `CallThread.give_back`."""
        with self._books:
            if not thread.ready.cancel():
                self._free += 1
                self._held[thread.tenant] -= 1
                self._free_bytes += thread.nbytes
                self._held_bytes[thread.tenant] -= thread.nbytes
            self._hand_out()

    def run(self, work: Callable[[], None]) -> None:
        """See `CallThread.start`."""
        self._pool.submit(work)

    def _hand_out(self) -> None:
        waiting, self._waiting = self._waiting, []
        reserved = False  # what is free is for a call further in front
        for thread in waiting:
            if thread.ready.cancelled():
                continue
            had = self._held_bytes[thread.tenant] + thread.nbytes  # the tenant's, with this one
            in_memory = not thread.nbytes or (not reserved and had <= self._free_bytes - thread.nbytes)
            if self._held[thread.tenant] >= self._free:
                self._waiting.append(thread)
            elif not in_memory:
                self._waiting.append(thread)
                reserved = reserved or had <= self._nbytes / 2  # else it waits for its own tenant
            elif thread.ready.set_running_or_notify_cancel():
                self._free -= 1
                self._held[thread.tenant] += 1
                self._free_bytes -= thread.nbytes
                self._held_bytes[thread.tenant] += thread.nbytes
                thread.ready.set_result(None)


class Pause(Generic[Q]):
    """A call has asked `question` and waits."""

    def __init__(self, question: Q) -> None:
        self.question = question


class PausingCall(Generic[Q, A, R]):
    """A computation that may ask.

    Args:
        work: The computation; it is given a function that asks a question and returns the answer.
        thread: Where it runs; it is there already, and is given back at the end.

    Attributes:
        busy_ns: How long it has computed so far, its pauses not counted.
    """

    def __init__(self, work: Callable[[Callable[[Q], A]], R], thread: CallThread) -> None:
        self.busy_ns = 0
        self._thread = thread
        # Locks, which are released by another thread than took them: the quickest way of handing a turn over.
        self._turn = threading.Lock()  # free when the call may go on
        self._back = threading.Lock()  # free when the call has paused or ended
        self._turn.acquire()
        self._back.acquire()
        self._question: Q | None = None
        self._answer: A | None = None
        self._result: R | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        thread.start(lambda: self._run(work))

    def resume(self, answer: A | None = None) -> Pause[Q] | R:
        """Let it go on, with the answer to its question if it has asked one; wait until it asks or ends.

        Raises:
            BaseException: What the computation raises.
        """
        start = time.perf_counter_ns()
        self._answer = answer
        self._turn.release()
        self._back.acquire()
        self.busy_ns += time.perf_counter_ns() - start
        if self._question is not None:
            question, self._question = self._question, None
            return Pause(question)
        # Nothing of the outcome stays here: an error holds the frames that it passed, and so the call's tensors.
        result, error, self._result, self._error = self._result, self._error, None, None
        if error is not None:
            try:
                raise error
            finally:
                del error
        return cast(R, result)

    def abandon(self) -> None:
        """End a call that has paused; what it computed is gone."""
        self._abandoned = True
        self._turn.release()
        self._back.acquire()

    def _run(self, work: Callable[[Callable[[Q], A]], R]) -> None:
        self._turn.acquire()
        try:
            if not self._abandoned:
                self._result = work(self.ask)
        except Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  # raised again by `resume`
            self._error = error
        finally:
            self._thread.give_back()
            self._back.release()

    def ask(self, question: Q) -> A:
        """Pause, on the call's own thread, until the answer is there; what the computation is given.

        Raises:
            Abandoned: the call is over.
        """
        self._question = question
        self._back.release()
        self._turn.acquire()
        if self._abandoned:
            raise Abandoned
        answer, self._answer = self._answer, None
        if answer is None:
            raise RuntimeError("a paused call went on without an answer")
        return answer
