"""The messages of sessions: each becomes a request to the engine, within what its tenant may have, and is answered.

Before its turn, a call with sites waits for a thread, and any call for room beside its tenant's calls in flight. One
that cannot be computed by its session's deadline is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.engine.engine import start_engine
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.engine.requests import Request, Share, TooLate
from isthmus.cloud.gateway.decode_requests import decoded
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
from isthmus.common.errors import ConfigError
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.transcript.chain import ADAPTERS, QUESTIONS, CloudTranscript, digest
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.framing import wipe
from isthmus.protocol.session import Oversized, Received

R = TypeVar("R")

ANSWER_SECONDS = 600.0
"""That an edge may take for its answer to a question in the middle of a call, which holds a thread and memory.

An edge computes for seconds; the rest is for one whose machine swaps, or that somebody debugs.
"""


class Calls:
    """What the calls of all sessions share.

    Args:
        served: the span and what belongs to it.
        threads: torch threads for computing.
        fraction: this worker's fraction of a tenant's quotas, which may change.
        metrics: where calls are counted.
        options: how the engine computes.
        clock: seconds that never go back, by which deadlines are kept.
        recorder: writes down what edges send and get; None for nothing.

    Attributes:
        engine: computes requests, in their turn.
        in_flight: the calls that have been taken and not answered.
        files: the threads that read and write files for edges.
        caches: keys and values of all sessions.
        records_history: whether answers are recorded (`isthmus.cloud.telemetry.event_history`).
        tokens: counts those of tenants who may have so many in all.
        metrics, clock, recorder: see above.
    """

    def __init__(
        self,
        served: Served,
        threads: int,
        fraction: Callable[[Tenant], float],
        metrics: Metrics,
        options: EngineOptions,
        clock: Callable[[], float],
        recorder: Recorder | None = None,
    ) -> None:
        self.in_flight = InFlight(fraction)
        self.metrics = metrics
        self.clock = clock
        self.recorder = recorder
        self.tokens = served.tokens
        self._served = served
        self._fraction = fraction
        self._options = options
        executor = served.executor
        self.engine = start_engine(executor, threads, options, is_computed=lambda reply: isinstance(reply, m.Timed))
        self._call_threads = CallThreads(self.engine.threads_of_a_call, options.paused_calls, executor.compute_bytes)
        self.files = FileThreads()
        rows = None if self.engine.invariance is None else self.engine.invariance.rows
        self._decoding = served.decoding(rows, options)
        self.caches = self._decoding.pool
        self.records_history = event_history.is_written()

    def of(
        self, session: OpenSession, limits: Limits, stage: StageSession | None, transcript: CloudTranscript | None
    ) -> SessionCalls:
        """What answers the messages of one session.

        Args:
            session: whose.
            limits: what it accepts.
            stage: with the pipeline's next stage, where there is one.
            transcript: of the session, where its edge has asked for one.
        """
        if self.recorder is not None:
            tenant, info = session.tenant, dataclasses.replace(self._served.info, session_id=session.id.hex())
            account = m.Account(tenant.name, tenant.quota.weight)
            self.recorder.opened(info, m.Attach(session.link, session.interactive, account=account))
        batching = self._options.batching
        work = self._served.session(
            session.id,
            session.tenant,
            self._call_threads,
            limits,
            batching=batching,
            decoding=self._decoding,
            of_worker=session.enrolled.stage,
        )
        return SessionCalls(self, session, work, stage, transcript)

    def share(self, tenant: Tenant) -> Share:
        """What a tenant may have of the engine's time."""
        rate = tenant.quota.max_tokens_per_second
        return Share(tenant.quota.weight, None if rate is None else rate * self._fraction(tenant))

    def shutdown(self, *, cancel: bool) -> None:
        """Give no more turns, and end once what waits is done, or, with `cancel`, cancelled."""
        self.files.shutdown()
        self.engine.shutdown(cancel=cancel)
        if self.recorder is not None:
            self.recorder.close()


class SessionCalls:
    """Answers the messages of one session, one after another. For the server's event loop alone.

    Args:
        calls: what is shared with other sessions.
        session: whose.
        work: what handles a message.
        stage: with the pipeline's next stage, where there is one.
        transcript: of the session; None where its edge wants none.
    """

    def __init__(
        self,
        calls: Calls,
        session: OpenSession,
        work: TenantSession,
        stage: StageSession | None,
        transcript: CloudTranscript | None,
    ) -> None:
        self._calls = calls
        self._session = session
        self._work = work
        self._stage = stage
        self._transcript = transcript

    @property
    def patience(self) -> float | None:
        """Seconds that the edge has left for the oldest answer that it owes; None where it owes none."""
        asked_at = self._work.calls.asked_at if self._work.calls.begun else None
        return None if asked_at is None else max(0.0, asked_at + ANSWER_SECONDS - time.monotonic())

    async def answer(self, stream: SealedStream, received: Received) -> None:
        """Have a message answered when it has had its turn, and send the answer."""
        calls, session, message = self._calls, self._session, received.message
        if calls.recorder is not None:
            calls.recorder.received(session.id, message)
        due = self._due(message)
        crypto_ns = stream.take_crypto_ns()
        with calls.in_flight.call():
            start = time.perf_counter_ns()
            sent = await self._digest(received)
            await self._thread_for(received)
            patience = None if due is None else due - calls.clock()
            try:
                async with calls.in_flight.room_for(session.tenant, received.body, patience):
                    reply = await self._reply(received, due)
            except TooLate:
                calls.metrics.deadlines.labels("refused").inc()
                reply = m.Status(m.StatusCode.TOO_LATE, getattr(message, "id", None), _too_late(session))
            if isinstance(reply, m.Timed):
                queue_ns = max(0, time.perf_counter_ns() - start - reply.compute_ns)
                reply = dataclasses.replace(reply, crypto_ns=crypto_ns, queue_ns=queue_ns)
                self._count(message, reply, due)
            elif isinstance(reply, m.Status) and reply.code != m.StatusCode.OK:
                calls.metrics.refused.labels(reply.code.name).inc()
            if reply is not None and not session.fenced:  # the edge goes on in a newer session
                if calls.records_history:
                    self._record(reply)
                if calls.recorder is not None:
                    calls.recorder.sent(session.id, message, reply)
                if self._transcript is not None and sent:
                    await asyncio.to_thread(self._transcript.answered, message, sent, reply)
                await stream.send(reply)
            calls.metrics.calls.labels(_operation(message)).inc()

    async def refuse(self, stream: SealedStream, refused: Oversized) -> None:
        """Say that a message is over its tenant's bytes in flight. A paused call whose answer it was is over."""
        stream.take_crypto_ns()  # counted for no call
        name, allowed = self._session.tenant.name, self._session.tenant.quota.max_inflight_bytes
        if refused.kind is m.SiteAnswer and refused.id is not None:
            drop = self._request(partial(self._work.calls.drop, refused.id.call))
            await asyncio.wrap_future(self._calls.engine.submit(drop))
        self._calls.metrics.refused.labels(m.StatusCode.OVER_QUOTA.name).inc()
        text = f"a call of {refused.size} bytes is over the {allowed} that {name} may have: send smaller batches"
        await stream.send(m.Status.saying(m.StatusCode.OVER_QUOTA, refused.id, text))

    def sign(self, message: m.SignTranscript) -> m.Message:
        """The signature under the session's transcript so far, or why there is none."""
        if self._transcript is None:
            return m.Status(m.StatusCode.BAD_REQUEST, None, "this session attached without a transcript")
        return self._transcript.sign(message, time.time())

    def close(self) -> None:
        """Forget the session."""
        engine, session = self._calls.engine, self._session.id
        # What a call in flight leaves in the activation cache is released behind it. After a drain that was cut short
        # there is no engine any more, and no need.
        engine.cancel(session)
        with contextlib.suppress(RuntimeError):
            # A call in flight counts as answered when it ends: only then nothing of the session is left to forget.
            engine.submit(self._request(self._work.close)).add_done_callback(lambda _: engine.cancel(session))

    async def _digest(self, received: Received) -> bytes:
        """The digest of a message for the transcript; empty where it has no place there."""
        if self._transcript is None or not isinstance(received.message, QUESTIONS + ADAPTERS):
            return b""
        try:  # on a thread: large messages take longer than the event loop has
            return await asyncio.to_thread(digest, received.message)
        except BaseException:  # the edge is gone
            wipe(received.body)
            raise

    def _due(self, message: m.Message) -> float | None:
        """By when a message that has just come in has to be computed, on the server's clock; None for no deadline."""
        computed = isinstance(message, m.Forward | m.Backward | m.Decode) and not _has_sites(message)
        if self._session.deadline is None or self._stage is not None or not computed:
            return None
        return self._calls.clock() + self._session.deadline

    async def _thread_for(self, received: Received) -> None:
        """Have a call with sites that begins wait until there is a thread for it, after those that came before it.

        One whose session has paused calls does not wait: others wait for the threads of these. One of a tenant who may
        have no sites is refused in its turn, and claims nothing.
        """
        message, allowance = received.message, self._session.tenant.quota.max_tokens
        if not _has_sites(message) or self._stage is not None or self._work.calls.begun or allowance is not None:
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
        try:
            refused = await self._over_allowance(received.message)
        except BaseException:  # the edge is gone
            wipe(received.body)
            raise
        if refused is not None:
            wipe(received.body)
            return refused
        if self._stage is None and isinstance(received.message, m.Sites):
            wipe(received.body)
            return await self._bind(received.message)
        if self._stage is None:
            return await self._answered(received, due)
        try:  # tensors of the body go on to the next stage, so it is overwritten when all have answered
            return await self._stage.answer(
                received.message, lambda message: self._answered(Received(message, bytearray()), None)
            )
        finally:
            wipe(received.body)

    async def _over_allowance(self, message: m.Message) -> m.Message | None:
        """Count a message's tokens where its tenant may have so many in all; a status where it may have no more.

        They count before they are computed, so that nothing that happens later gives them back; a call that is too
        large is refused first. The refusal is no `OVER_QUOTA`, after which edges try again.
        """
        tenant = self._session.tenant
        if tenant.quota.max_tokens is None:
            return None
        if isinstance(message, m.Sites | m.Lease) or _has_sites(message):
            fault: str | None = f"{tenant.name} has an allowance of tokens (max-tokens): no adapters inside the cloud"
        elif isinstance(message, m.Forward | m.Backward | m.Decode):
            try:
                self._work.check_bounds(message)
            except (ConfigError, ValueError) as error:
                return self._work.refusal(message, error)
            count = partial(self._calls.tokens.take, tenant, self._work.positions(message))
            fault = await self._calls.files.run(tenant.fingerprint.digest, count, lambda: None)
        else:
            return None
        return None if fault is None else m.Status.saying(m.StatusCode.BAD_REQUEST, getattr(message, "id", None), fault)

    async def _answered(self, received: Received, due: float | None) -> m.Message | None:
        """Have a message handled where it belongs: on a compute thread, or on one for files."""
        message = received.message
        if isinstance(message, m.Decode):
            engine, deadline = self._calls.engine, self._on_engine(due)
            return await decoded(message, received.body, self._work, engine, self._request, deadline)
        if not isinstance(message, FILE_MESSAGES):
            return await asyncio.wrap_future(self._submit(received, due))
        share = self._calls.share(self._session.tenant)  # which is for the event loop alone to ask

        def compute(run: Callable[[], R], positions: int, nbytes: int) -> R:
            # It does not wait for its tenant's rate: other tenants' checks wait for the thread that waits here.
            request = self._request(run, share, positions=positions, nbytes=nbytes, rate_positions=0)
            return self._calls.engine.submit(request).result()

        return await self._calls.files.run(
            self._session.tenant.fingerprint.digest,
            partial(self._work.handle, message, compute),
            lambda: wipe(received.body),
            check=isinstance(message, m.PlugIn),
        )

    async def _bind(self, message: m.Sites) -> m.Message | None:
        """Have a list of sites answered, which holds no tensors, step by step; others have their turns in between."""
        steps = self._work.bind(message)
        answer: m.Message | None = None
        while answer is None:
            answer = await asyncio.wrap_future(self._calls.engine.submit(self._request(partial(next, steps))))
        return answer

    def _submit(self, received: Received, due: float | None) -> Future[m.Message | None]:
        """Have a message handled by the engine, and its body overwritten, also where nobody waits any more."""
        try:
            running = self._calls.engine.submit(self._request_for(received.message, due))
        except RuntimeError:  # a drain was cut short
            wipe(received.body)
            raise
        # What is needed longer, the executor has copied.
        running.add_done_callback(lambda _: wipe(received.body))
        return running

    def _request_for(self, message: m.Message, due: float | None) -> Request[m.Message | None]:
        """What a message wants of the engine."""
        work, sited, positions = self._work, _has_sites(message), self._work.positions(message)
        keeps = isinstance(message, m.Forward) and message.keep and not sited
        return self._request(
            partial(work.handle, message),
            kind=work.kind_of(message),
            item=(work, message),
            run_batch=handle_batch if kind_of(message) is not None else step_batch,
            positions=positions,
            deadline=self._on_engine(due),
            rate_positions=0 if isinstance(message, m.SiteAnswer) else None,
            nbytes=0 if sited else work.call_bytes(message),  # one with sites has memory with its thread
            keeps_bytes=positions * work.executor.memory.kept_per_position if keeps else 0,
        )

    def _on_engine(self, due: float | None) -> float | None:
        """A deadline on the engine's clock."""
        return None if due is None else time.monotonic() + due - self._calls.clock()

    def _request(self, run: Callable[[], R], share: Share | None = None, **wishes: Any) -> Request[R]:
        """A request of the session; `wishes` are further attributes of it."""
        tenant = self._session.tenant
        share = share or self._calls.share(tenant)
        return Request(tenant.name, self._session.id, share, run, interactive=self._session.interactive, **wishes)

    def _count(self, message: m.Message, reply: m.Timed, due: float | None) -> None:
        """Have the metrics show what was computed for a message."""
        metrics, operation = self._calls.metrics, _operation(message)
        if due is not None:
            metrics.deadlines.labels("met" if self._calls.clock() <= due else "late").inc()
        metrics.seconds.labels(operation).observe(reply.compute_ns / 1e9)
        metrics.waited.labels("interactive" if self._session.interactive else "training").observe(reply.queue_ns / 1e9)
        if isinstance(message, m.Forward | m.Backward | m.Decode):
            metrics.tokens.labels(operation).inc(self._work.positions(message))

    def _record(self, reply: m.Message) -> None:
        """Have the history show an answer, and of which call it is the result."""
        call = dataclasses.astuple(reply.id) if isinstance(reply, m.ForwardReply | m.BackwardReply) else None
        session, link = self._session.id.hex(), self._session.link.hex()
        event_history.record("answered", session=session, link=link, kind=_operation(reply), call=call)


def _operation(message: m.Message) -> str:
    return type(message).__name__.lower()


def _too_late(session: OpenSession) -> str:
    return (
        f"it could not be computed within {session.deadline} s: ask again when fewer others do, or allow it more time"
    )


def _has_sites(message: m.Message) -> bool:
    return isinstance(message, m.Forward | m.Backward) and bool(message.sites)
