"""The messages of sessions: each has its turn on the compute threads, within what its tenant may have, and is answered.

Before its turn, a call with sites waits for a thread, and any call for room beside its tenant's calls in flight. One
that cannot be computed by its session's deadline is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from isthmus.cloud.engine.compute_threads import Shared, TooLate
from isthmus.cloud.engine.engine import compute_threads
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.engine.requests import Share
from isthmus.cloud.gateway.in_flight import InFlight
from isthmus.cloud.gateway.open_sessions import OpenSession
from isthmus.cloud.gateway.pipeline import StageSession
from isthmus.cloud.gateway.stream import SealedStream
from isthmus.cloud.session.batched_calls import handle_batch, step_batch
from isthmus.cloud.session.file_threads import FILE_MESSAGES, FileThreads
from isthmus.cloud.session.handler import TenantSession, kind_of
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry import event_history
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.record import wipe
from isthmus.protocol.session import Oversized, Received

R = TypeVar("R")

ANSWER_SECONDS = 600.0
"""That an edge may take for its answer to a question in the middle of a call, which holds a thread and memory."""


class Calls:
    """What the calls of all sessions share: threads, turns, and what is in flight.

    Args:
        served: the span and what belongs to it.
        threads: torch threads for computing.
        part: the part of a tenant's quotas that is this worker's to give, which may change.
        metrics: where calls are counted.
        batching: whether calls of several sessions may share a pass.
        clock: seconds that never go back, by which deadlines are kept.

    Attributes:
        in_flight: the calls that have been taken and not answered.
        files: the threads that read and write files for edges.
        records_history: whether answers are recorded (`isthmus.cloud.telemetry.event_history`).
        metrics: see above.
        clock: see above.
    """

    def __init__(
        self,
        served: Served,
        threads: int,
        part: Callable[[Tenant], float],
        metrics: Metrics,
        *,
        batching: bool,
        clock: Callable[[], float],
    ) -> None:
        self.in_flight = InFlight(part)
        self.metrics = metrics
        self.clock = clock
        self._served = served
        self._part = part
        self._batching = batching
        computing = compute_threads(
            served.executor, threads, batching=batching, computed=lambda reply: isinstance(reply, m.Timed)
        )
        self._compute, self._invariance = computing.dispatcher, computing.invariance
        self._call_threads = CallThreads(computing.threads_of_a_call, served.executor.compute_bytes)
        self.files = FileThreads()
        self.records_history = event_history.is_written()

    def of(self, session: OpenSession, limits: Limits, stage: StageSession | None) -> SessionCalls:
        """What answers the messages of one session.

        Args:
            session: whose.
            limits: what it accepts.
            stage: with the pipeline's next stage, where there is one.
        """
        work = self._served.session(session.id, session.tenant, self._call_threads, limits, batching=self._batching)
        return SessionCalls(self, session, work, stage)

    def turn(
        self,
        session: OpenSession,
        run: Callable[[], R],
        positions: int = 0,
        shared: Shared[Any, R] | None = None,
        deadline: float | None = None,
        *,
        continues: bool = False,
        nbytes: int = 0,
        share: Share | None = None,
    ) -> Future[R]:
        """Have something done by the compute thread when it is the tenant's turn.

        With the tenant's `share` it may be called from any thread. The other arguments are `Dispatcher.submit`'s, as is
        what is raised.
        """
        return self._compute.submit(
            run,
            tenant=session.tenant.name,
            owner=session.id,
            share=share or self.share(session.tenant),
            interactive=session.interactive,
            positions=positions,
            shared=shared,
            deadline=deadline,
            continues=continues,
            nbytes=nbytes,
        )

    def cancel(self, session: OpenSession) -> None:
        """Cancel what waits for a turn of a session."""
        self._compute.cancel(session.id)

    def shutdown(self, *, cancel: bool) -> None:
        """Give no more turns, and end once what waits is done, or, with `cancel`, cancelled."""
        self.files.shutdown()
        self._compute.shutdown(cancel=cancel)

    def observe_stash(self) -> None:
        """Have the metrics show how full the stash is."""
        executor = self._served.executor
        self.metrics.stash_bytes.set(executor.used_bytes)
        self.metrics.evictions.set(executor.counters.graphs_evicted)
        self.metrics.recomputed.set(executor.counters.recomputed)

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows of them and of the stash. May be called from any thread."""
        executor = self._served.executor
        waiting = self._compute.waiting()
        return {
            "in_flight": self.in_flight.calls,
            "waiting": dict(waiting),
            "calls_per_pass": self._compute.calls_per_pass,
            "same_bits_from": 0 if self._invariance is None else self._invariance.rows,
            "all_threads_from": 0 if self._invariance is None else self._invariance.threads,
            "calls_per_meeting": executor.host.product_batches.requests_per_batch,
            "queue_depth": sum(waiting.values()),
            "overdue": self._compute.overdue(),
            "deadlines": self.metrics.outcomes(),
            "stash_bytes": executor.used_bytes,
            "stash_budget_bytes": executor.stash_bytes,
            "compute_budget_bytes": executor.compute_bytes if math.isfinite(executor.compute_bytes) else None,
            "graphs_evicted": executor.counters.graphs_evicted,
            "inputs_evicted": executor.counters.inputs_evicted,
            "recomputed": executor.counters.recomputed,
        }

    def share(self, tenant: Tenant) -> Share:
        """What a tenant may have of the compute threads' time."""
        rate = tenant.quota.max_tokens_per_second
        return Share(tenant.quota.weight, None if rate is None else rate * self._part(tenant))


class SessionCalls:
    """Answers the messages of one session, one after another. For the server's event loop alone.

    Args:
        calls: what is shared with other sessions.
        session: whose.
        work: what handles a message.
        stage: with the pipeline's next stage, where there is one.
    """

    def __init__(self, calls: Calls, session: OpenSession, work: TenantSession, stage: StageSession | None) -> None:
        self._calls = calls
        self._session = session
        self._work = work
        self._stage = stage

    @property
    def patience(self) -> float | None:
        """Seconds that the edge has left for the oldest answer that it owes; None where it owes none."""
        asked_at = self._work.calls.asked_at if self._work.calls.begun else None
        return None if asked_at is None else max(0.0, asked_at + ANSWER_SECONDS - time.monotonic())

    async def answer(self, stream: SealedStream, received: Received) -> None:
        """Have a message answered when it has had its turn, and send the answer."""
        due = self._due(received.message)
        crypto_ns = stream.take_crypto_ns()
        message, metrics = received.message, self._calls.metrics
        with self._calls.in_flight.call():
            start = time.perf_counter_ns()
            await self._thread_for(received)
            patience = None if due is None else due - self._calls.clock()
            try:
                async with self._calls.in_flight.room_for(self._session.tenant, received.body, patience):
                    reply = await self._reply(received, due)
            except TooLate:
                metrics.deadlines.labels("refused").inc()
                reply = m.Status(m.StatusCode.TOO_LATE, getattr(message, "id", None), _too_late(self._session))
            elapsed = time.perf_counter_ns() - start
            if isinstance(reply, m.Timed):
                self._count(message, reply, due)
                queue_ns = max(0, elapsed - reply.compute_ns)
                priority = "interactive" if self._session.interactive else "training"
                metrics.waited.labels(priority).observe(queue_ns / 1e9)
                reply = dataclasses.replace(reply, crypto_ns=crypto_ns, queue_ns=queue_ns)
            elif isinstance(reply, m.Status) and reply.code != m.StatusCode.OK:
                metrics.refused.labels(reply.code.name).inc()
            self._calls.observe_stash()
            if reply is not None and not self._session.fenced:  # the edge goes on in a newer session
                if self._calls.records_history:
                    self._record(reply)
                await stream.send(reply)
            metrics.calls.labels(_operation(message)).inc()

    def _record(self, reply: m.Message) -> None:
        """Have the history show an answer, and of which call it is the result."""
        result = reply.id if isinstance(reply, m.ForwardReply | m.BackwardReply) else None
        event_history.record(
            "answered",
            session=self._session.id.hex(),
            link=self._session.link.hex(),
            kind=_operation(reply),
            call=None if result is None else dataclasses.astuple(result),
        )

    async def refuse(self, stream: SealedStream, refused: Oversized) -> None:
        """Say that a message is over its tenant's bytes in flight. A paused call whose answer it was is over."""
        stream.take_crypto_ns()  # counted for no call
        name, allowed = self._session.tenant.name, self._session.tenant.quota.max_inflight_bytes
        if refused.kind is m.SiteAnswer and refused.id is not None:
            drop = partial(self._work.calls.drop, refused.id.call)
            await asyncio.wrap_future(self._calls.turn(self._session, drop))
        self._calls.metrics.refused.labels(m.StatusCode.OVER_QUOTA.name).inc()
        text = f"a call of {refused.size} bytes is over the {allowed} that {name} may have: send smaller batches"
        await stream.send(m.Status.saying(m.StatusCode.OVER_QUOTA, refused.id, text))

    def close(self) -> None:
        """Forget the session."""
        calls, session = self._calls, self._session
        # The stash belongs to the compute thread; the release waits its turn behind a call in flight. After a drain
        # that was cut short there is no thread any more, and no need.
        calls.cancel(session)
        with contextlib.suppress(RuntimeError):
            # A call in flight counts as answered when it ends: only then nothing of the session is left to forget.
            calls.turn(session, self._work.close).add_done_callback(lambda _: calls.cancel(session))

    def _due(self, message: m.Message) -> float | None:
        """By when a message that has just come in has to be computed, on the server's clock; None for no deadline."""
        if self._session.deadline is None or self._stage is not None or kind_of(message) is None:
            return None
        return self._calls.clock() + self._session.deadline

    async def _thread_for(self, received: Received) -> None:
        """Have a call with sites that begins wait until there is a thread for it, after those that came before it.

        One whose session has paused calls does not wait: others wait for the threads of these.
        """
        message = received.message
        sited = isinstance(message, m.Forward | m.Backward) and message.sites and self._stage is None
        if not sited or self._work.calls.begun:
            return
        try:
            thread = self._work.calls.claim(self._work.call_bytes(message))
        except ValueError:
            return  # it takes too much memory, and is refused in its turn, where it claims a thread again
        try:
            await asyncio.wrap_future(thread.ready)
        except asyncio.CancelledError:  # the edge is gone; the thread is given back with its session
            wipe(received.body)
            raise

    async def _reply(self, received: Received, due: float | None) -> m.Message | None:
        """Have a message answered by this worker, and by the stages behind it where there are any."""
        if self._stage is None and isinstance(received.message, m.Sites):
            wipe(received.body)
            return await self._bind(received.message)
        if self._stage is None:
            return await self._answered(received, due)
        try:  # parts of the body go on to the next stage, so it is overwritten when all have answered
            return await self._stage.answer(
                received.message, lambda message: self._answered(Received(message, bytearray()), None)
            )
        finally:
            wipe(received.body)

    async def _answered(self, received: Received, due: float | None) -> m.Message | None:
        """Have a message handled where it belongs: on a compute thread, or on one for files."""
        message = received.message
        if not isinstance(message, FILE_MESSAGES):
            return await asyncio.wrap_future(self._submit(received, due))
        share = self._calls.share(self._session.tenant)  # for the event loop alone to ask

        def compute(run: Callable[[], R], positions: int, nbytes: int) -> R:
            # It does not wait for its tenant's rate: other tenants' checks wait for the thread that waits here.
            turn = self._calls.turn(self._session, run, positions, continues=True, nbytes=nbytes, share=share)
            return turn.result()

        return await self._calls.files.run(
            self._session.tenant.fingerprint.digest,
            partial(self._work.handle, message, compute),
            lambda: wipe(received.body),
            check=isinstance(message, m.PlugIn),
        )

    async def _bind(self, message: m.Sites) -> m.Message | None:
        """Have a list of sites answered, which holds no tensors, in pieces, between which others have their turns."""
        pieces = self._work.bind(message)
        answer: m.Message | None = None
        while answer is None:
            answer = await asyncio.wrap_future(self._calls.turn(self._session, partial(next, pieces)))
        return answer

    def _submit(self, received: Received, due: float | None = None) -> Future[m.Message | None]:
        """Have a message handled by the compute thread, and its body overwritten, also where nobody waits any more."""
        message, work = received.message, self._work
        kind, in_pass = work.kind_of(message), kind_of(message) is not None
        sited = isinstance(message, m.Forward | m.Backward) and bool(message.sites)
        shared: Shared[Any, m.Message | None] | None = None
        if kind is not None:
            shared = Shared(kind, (work, message), handle_batch if in_pass else step_batch)
        try:
            running = self._calls.turn(
                self._session,
                partial(work.handle, message),
                work.calls.positions(message) if isinstance(message, m.SiteAnswer) else _positions(message),
                shared,
                None if due is None else due - self._calls.clock(),
                continues=isinstance(message, m.SiteAnswer),
                nbytes=0 if sited else work.call_bytes(message),  # with sites, its thread has them until it ends
            )
        except RuntimeError:  # a drain was cut short
            wipe(received.body)
            raise
        # What is needed longer, the executor has copied.
        running.add_done_callback(lambda _: wipe(received.body))
        return running

    def _count(self, message: m.Message, reply: m.Timed, due: float | None) -> None:
        """Have the metrics show what was computed for a message."""
        metrics, operation = self._calls.metrics, _operation(message)
        if due is not None:
            metrics.deadlines.labels("met" if self._calls.clock() <= due else "late").inc()
        metrics.seconds.labels(operation).observe(reply.compute_ns / 1e9)
        if isinstance(message, m.Forward | m.Backward):
            metrics.tokens.labels(operation).inc(_positions(message))


def _operation(message: m.Message) -> str:
    return type(message).__name__.lower()


def _too_late(session: OpenSession) -> str:
    return (
        f"it could not be computed within {session.deadline} s: ask again when fewer others do, or allow it more time"
    )


def _positions(message: m.Message) -> int:
    """Token positions that a message wants computed."""
    if not isinstance(message, m.Forward | m.Backward):
        return 0
    sent = message.hidden if isinstance(message, m.Forward) else message.gradient
    return sent.shape[0] * sent.shape[1]
