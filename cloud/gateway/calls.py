"""The messages of sessions: each becomes a request to the engine, within what its tenant may have, and is answered.

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

from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.engine.engine import start_engine
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.engine.requests import Request, Share, TooLate
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
from isthmus.protocol.secure.framing import wipe
from isthmus.protocol.session import Oversized, Received

R = TypeVar("R")

ANSWER_SECONDS = 600.0
"""That an edge may take for its answer to a question in the middle of a call, which holds a thread and memory."""


class Calls:
    """What the calls of all sessions share: the engine, the threads of paused calls, and what is in flight.

    Args:
        served: the span and what belongs to it.
        threads: torch threads for computing.
        part: the part of a tenant's quotas that is this worker's to give, which may change.
        metrics: where calls are counted.
        options: how the engine computes.
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
        options: EngineOptions | None = None,
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
        options = options or EngineOptions()
        setup = start_engine(
            served.executor,
            threads,
            options,
            batching=batching,
            is_computed=lambda reply: isinstance(reply, m.Timed),
        )
        self._engine, self._invariance = setup.engine, setup.invariance
        memory = served.executor.compute_bytes
        self._call_threads = CallThreads(setup.threads_of_a_call, memory, options.paused_calls)
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

    def submit(self, request: Request[R]) -> Future[R]:
        """Have a request computed when its turn comes. May be called from any thread.

        Raises:
            RuntimeError: a drain was cut short.
        """
        return self._engine.submit(request)

    def request(self, session: OpenSession, run: Callable[[], R]) -> Request[R]:
        """A request of a session to have something done that computes no token positions."""
        tenant = session.tenant
        return Request(tenant.name, session.id, self.share(tenant), run, interactive=session.interactive)

    def cancel(self, session: OpenSession) -> None:
        """Cancel what waits for a turn of a session."""
        self._engine.cancel(session.id)

    def shutdown(self, *, cancel: bool) -> None:
        """Give no more turns, and end once what waits is done, or, with `cancel`, cancelled."""
        self.files.shutdown()
        self._engine.shutdown(cancel=cancel)

    def observe_stash(self) -> None:
        """Have the metrics show how full the stash is."""
        executor = self._served.executor
        self.metrics.stash_bytes.set(executor.used_bytes)
        self.metrics.evictions.set(executor.counters.graphs_evicted)
        self.metrics.recomputed.set(executor.counters.recomputed)

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows of them and of the stash. May be called from any thread."""
        executor = self._served.executor
        waiting = self._engine.waiting()
        return {
            "in_flight": self.in_flight.calls,
            "waiting": dict(waiting),
            "calls_per_pass": self._engine.calls_per_pass,
            "same_bits_from": 0 if self._invariance is None else self._invariance.rows,
            "all_threads_from": 0 if self._invariance is None else self._invariance.threads,
            "calls_per_meeting": executor.host.product_batches.requests_per_batch,
            "queue_depth": sum(waiting.values()),
            "overdue": self._engine.overdue(),
            "deadlines": self.metrics.outcomes(),
            "stash_bytes": executor.used_bytes,
            "stash_budget_bytes": executor.stash_bytes,
            "compute_budget_bytes": executor.compute_bytes if math.isfinite(executor.compute_bytes) else None,
            "graphs_evicted": executor.counters.graphs_evicted,
            "inputs_evicted": executor.counters.inputs_evicted,
            "recomputed": executor.counters.recomputed,
        }

    def share(self, tenant: Tenant) -> Share:
        """What a tenant may have of the engine's time."""
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
            await asyncio.wrap_future(self._calls.submit(self._calls.request(self._session, drop)))
        self._calls.metrics.refused.labels(m.StatusCode.OVER_QUOTA.name).inc()
        text = f"a call of {refused.size} bytes is over the {allowed} that {name} may have: send smaller batches"
        await stream.send(m.Status.saying(m.StatusCode.OVER_QUOTA, refused.id, text))

    def close(self) -> None:
        """Forget the session."""
        calls, session = self._calls, self._session
        # What a call in flight leaves in the activation cache is released behind it. After a drain that was cut short
        # there is no engine any more, and no need.
        calls.cancel(session)
        with contextlib.suppress(RuntimeError):
            # A call in flight counts as answered when it ends: only then nothing of the session is left to forget.
            closed = calls.submit(calls.request(session, self._work.close))
            closed.add_done_callback(lambda _: calls.cancel(session))

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
        plain = self._calls.request(self._session, lambda: None)  # the share is for the event loop alone to ask

        def compute(run: Callable[[], R], positions: int, nbytes: int) -> R:
            # It does not wait for its tenant's rate: other tenants' checks wait for the thread that waits here.
            request = Request(
                plain.tenant,
                plain.session,
                plain.share,
                run,
                interactive=plain.interactive,
                positions=positions,
                continues=True,
                nbytes=nbytes,
            )
            return self._calls.submit(request).result()

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
            request = self._calls.request(self._session, partial(next, pieces))
            answer = await asyncio.wrap_future(self._calls.submit(request))
        return answer

    def _submit(self, received: Received, due: float | None = None) -> Future[m.Message | None]:
        """Have a message handled by the engine, and its body overwritten, also where nobody waits any more."""
        try:
            running = self._calls.submit(self._request(received.message, due))
        except RuntimeError:  # a drain was cut short
            wipe(received.body)
            raise
        # What is needed longer, the executor has copied.
        running.add_done_callback(lambda _: wipe(received.body))
        return running

    def _request(self, message: m.Message, due: float | None) -> Request[m.Message | None]:
        """What a message wants of the engine."""
        work, session = self._work, self._session
        request = self._calls.request(session, partial(work.handle, message))
        request.kind, request.item = work.kind_of(message), (work, message)
        request.run_batch = handle_batch if kind_of(message) is not None else step_batch
        request.continues = isinstance(message, m.SiteAnswer)
        request.positions = work.calls.positions(message) if isinstance(message, m.SiteAnswer) else _positions(message)
        sited = isinstance(message, m.Forward | m.Backward) and bool(message.sites)
        if not sited:  # the thread of a call with sites has memory for it until it ends
            request.nbytes = work.call_bytes(message)
        if isinstance(message, m.Forward) and message.keep and not sited:
            request.keeps_bytes = request.positions * work.executor.memory.kept_per_position
        if due is not None:
            request.deadline = time.monotonic() + due - self._calls.clock()
        return request

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
