"""The worker's data plane: a grpc.aio server whose streams carry sealed sessions.

One stream is one session. Frames are opened and sealed on the event loop, which takes microseconds; spans run on
compute threads, so the event loop stays free for other streams and for health checks. Ray is not mentioned here: the
worker actor starts this server, and tests start it without one.

Draining: no new session is admitted, the calls in flight are answered, then every stream gets a `Goodbye` and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio

from isthmus.backbone.checkpoints.weight_quantization import bytes_of
from isthmus.backbone.runtime.numerics import FIRST_OF_STAGES, numerics
from isthmus.cloud.bounds import REVIEW_SECONDS, ROOM_SECONDS, Allowance, Bounds
from isthmus.cloud.gateway.admission import Admission
from isthmus.cloud.gateway.bounded_server import bind, bounded_server, stream_handler
from isthmus.cloud.gateway.calls import Calls
from isthmus.cloud.gateway.half_open import HalfOpen
from isthmus.cloud.gateway.hang_up import HangUp, IdleConnections
from isthmus.cloud.gateway.health import Health
from isthmus.cloud.gateway.open_sessions import OpenSession, Sessions
from isthmus.cloud.gateway.pipeline import NextStage, StageSession
from isthmus.cloud.gateway.stream import SealedStream
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.telemetry.logs import log
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.common.errors import LimitError, RemoteProtocolError, VersionError
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.transcript.chain import CloudTranscript, Session
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.keys import WorkerIdentity
from isthmus.protocol.service import (
    GOODBYE_SECONDS,
    METHOD,
    OLD_METHOD,
    SERVER_CODING,
)
from isthmus.protocol.session import Oversized


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM bytes of the outer TLS layer.

    The server's key and certificate chain, and a CA where clients must show a certificate.
    """

    key: bytes = field(repr=False)
    cert: bytes
    client_ca: bytes | None = None


class GatewayServer:
    """Serves one span to enrolled edges.

    Args:
        served: the span and what belongs to it.
        identity: returns the worker's key and its certificate, signed by the root key (which is not here); called at
            every handshake, so that a renewed certificate needs no restart.
        edges: returns the current `authorized_edges`; called at every handshake, so that an enrolment needs no restart.
        threads: torch threads for computing.
        bounds: limits on what others can make it hold.
        next_stage: where calls go on, in a pipeline; None where this worker has the span's last layer.
        clock: seconds that never go back, by which deadlines are kept.
        recorder: writes down what edges send and get; None for nothing.

    Attributes:
        metrics: what it counts.
        sessions: those that are open.
    """

    def __init__(
        self,
        served: Served,
        identity: Callable[[], WorkerIdentity],
        edges: Callable[[], AuthorizedEdges],
        threads: int,
        next_stage: NextStage | None = None,
        *,
        bounds: Bounds | None = None,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
    ) -> None:
        self.metrics = Metrics()
        self.sessions = Sessions(self.metrics)
        cache = served.executor.cache
        self.metrics.certificate.set_function(lambda: identity().certificate.not_after)
        self.metrics.cached_bytes.set_function(lambda: cache.used)
        self.metrics.evictions.set_function(lambda: cache.counters.graphs_evicted)
        self.metrics.recomputed.set_function(lambda: cache.counters.recomputed)
        self._identity = identity
        self._bounds = bounds or Bounds()
        self._edges = edges
        self._clock = clock
        self._executor, self._next_stage = served.executor, next_stage
        half_open = HalfOpen(self._bounds)
        fraction, engine = self.sessions.fraction_of, self._bounds.engine
        self._calls = Calls(served, threads, fraction, self.metrics, engine, clock, recorder)
        note = self._calls.engine.threads_note if next_stage is None else FIRST_OF_STAGES
        where = (served.info.span_dtype, served.info.attn_implementation, served.executor.device)
        self._info = replace(served.info, numerics=numerics(*where, threads, note))
        self._admission = Admission(self._info, identity, edges, self.sessions, self.metrics, half_open, clock)
        caches = self._calls.caches
        self.metrics.cache_bytes.set_function(lambda: caches.used)
        self.metrics.caches_evicted.set_function(lambda: caches.counters.evicted)
        self.metrics.caches_lost.set_function(lambda: caches.counters.lost)
        self._hang_up = HangUp(self._bounds.linger_seconds)
        self._connections = IdleConnections(self._bounds.max_connections)
        self._health = Health(half_open, self._hang_up, self._connections)
        self._watching: tuple[asyncio.Task[None], ...] = ()
        self._server: grpc.aio.Server | None = None
        self._started = time.time()
        self._span_bytes = bytes_of(served.executor.host.span)

    async def start(self, listen: str, tls: ServerTls | None) -> int:
        """Listen on `host:port` and return the port. Raises PortInUseError."""
        server = bounded_server(self._bounds)
        for path, coding in ((METHOD, SERVER_CODING), (OLD_METHOD, {})):
            _, service, method = path.split("/")
            session = stream_handler(self._session, **coding)
            server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: session})])
        server.add_generic_rpc_handlers([self._health.handlers()])
        credentials = None
        if tls is not None:
            credentials = grpc.ssl_server_credentials(
                [(tls.key, tls.cert)], tls.client_ca, require_client_auth=tls.client_ca is not None
            )
        port = bind(server, listen, credentials)
        await server.start()
        self._server = server
        await self._health.serving()
        self._watching = (
            asyncio.create_task(self._review(), name="review of sessions"),
            asyncio.create_task(self._make_room(port), name="room for connections"),
        )
        log("serving", listen=listen, port=port, model=self._info.model, plan=self._info.plan)
        return port

    async def drain(self, grace: float) -> bool:
        """Stop admitting sessions, answer the calls in flight, say goodbye.

        True if all were answered within `grace` seconds.
        """
        if self._server is None:
            return True
        log("draining", in_flight=self._calls.in_flight.calls, sessions=len(self.sessions))
        self._admission.stop()
        await self._health.draining()
        for each in self._watching:
            each.cancel()
        self.sessions.end_all("draining")
        try:
            await asyncio.wait_for(self._calls.in_flight.all_answered(), grace)
            finished = True
        except TimeoutError:
            finished = False
        await self._server.stop(grace=GOODBYE_SECONDS if finished else 0.0)
        if finished:  # the compute thread ends the calls that have paused, as their sessions leave
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.sessions.all_left(), GOODBYE_SECONDS)
        self._calls.shutdown(cancel=not finished)
        log("stopped", all_answered=finished)
        return finished

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows. May be called from any thread."""
        executor, cache, engine = self._executor, self._executor.cache, self._calls.engine
        waiting, invariance, caches = engine.waiting(), engine.invariance, self._calls.caches
        return {
            "state": "draining" if self._admission.stopped else "serving",
            "model": self._info.model,
            "plan": self._info.plan,
            "span_dtype": self._info.span_dtype,
            "span_bytes": self._span_bytes,
            "uptime_s": time.time() - self._started,
            "certificate_not_after": self._identity().certificate.not_after,
            "sessions": self.sessions.by_tenant(),
            "in_flight": self._calls.in_flight.calls,
            "waiting": dict(waiting),
            "calls_per_pass": engine.calls_per_pass,
            "shared_calls": engine.shared_by_tenant,
            "same_bits_from": 0 if invariance is None else invariance.rows,
            "all_threads_from": 0 if invariance is None else invariance.threads,
            "calls_per_meeting": executor.host.product_batches.requests_per_batch,
            "queue_depth": sum(waiting.values()),
            "overdue": engine.overdue(),
            "deadlines": self.metrics.outcomes(),
            "stash_bytes": cache.used,
            "stash_budget_bytes": cache.budget,
            "compute_budget_bytes": executor.compute_bytes if math.isfinite(executor.compute_bytes) else None,
            "graphs_evicted": cache.counters.graphs_evicted,
            "inputs_evicted": cache.counters.inputs_evicted,
            "recomputed": cache.counters.recomputed,
            "caches": len(caches),
            "cache_bytes": caches.used,
            "cache_budget_bytes": caches.budget,
            "caches_evicted": caches.counters.evicted,
            "caches_lost": caches.counters.lost,
        }

    async def _session(self, frames: AsyncIterator[bytes], context: Any) -> None:
        """One stream of a connection."""
        with self._connections.in_use(context.peer()):
            await self._stream(frames, context)

    async def _stream(self, frames: AsyncIterator[bytes], context: Any) -> None:
        """One stream: the handshake, then calls until either side ends it."""
        limits = Limits(max_message_bytes=self._info.limits.max_message_bytes)
        protocol = self._admission.protocol(limits)
        stream = SealedStream(protocol, frames, context, self.metrics, self._bounds.transfer, self._clock)
        try:
            session = await self._admission.admit(protocol, stream, context)
            if session is not None and not await self._serve(stream, session, limits):
                await self._hang_up.abort(
                    context, grpc.StatusCode.PERMISSION_DENIED, f"the session was cut off: {session.why}"
                )
        except (RemoteProtocolError, VersionError) as error:
            self._admission.offended(protocol)
            log("protocol_error", tenant=None if protocol.tenant is None else protocol.tenant.name, error=str(error))
            await self._hang_up.abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the session's rules were broken")
        except grpc.aio.AbortError:
            raise  # the session was cut off
        except grpc.aio.BaseError as error:  # the stream broke while it was written to
            log("stream_broke", error=type(error).__name__)
        except Exception as error:  # noqa: BLE001  # whatever it is, gRPC would send its text in the clear
            log("session_failed", logging.ERROR, error=type(error).__name__)
            await self._hang_up.abort(
                context, grpc.StatusCode.INTERNAL, "the session failed; the cloud's owner has a log of it"
            )
        finally:
            protocol.close()
            self._hang_up.when_lingering(context, stream.in_transit)

    async def _serve(self, stream: SealedStream, session: OpenSession, limits: Limits) -> bool:
        """Serve a session until it ends; False where it was cut off."""
        try:
            async with asyncio.timeout(None) as session.cutoff, self._stage_of(session) as stage:
                await self._converse(stream, session, limits, stage)
        except TimeoutError:
            if session.cutoff is None or not session.cutoff.expired():
                raise
            return False
        finally:
            self.sessions.leave(session)
        return True

    async def _review(self) -> None:
        """End sessions whose enrolment changed or that are too old, again and again."""
        edges = before = self._edges()
        while True:
            await asyncio.sleep(REVIEW_SECONDS)
            before, edges = edges, self._edges()
            if edges == before:  # else the file may be half written
                self.sessions.review(edges, self._clock(), self._bounds.max_session_age)

    async def _make_room(self, port: int) -> None:
        """Close connections that are too many, again and again."""
        while True:
            with contextlib.suppress(OSError):  # no descriptor is left for the look: the next one may find some
                self._connections.make_room(port)
            await asyncio.sleep(ROOM_SECONDS)

    @contextlib.asynccontextmanager
    async def _stage_of(self, session: OpenSession) -> AsyncIterator[StageSession | None]:
        """With the pipeline's next stage, where there is one."""
        if self._next_stage is None:
            yield None
            return
        account = m.Account(session.tenant.name, session.tenant.quota.weight)
        async with self._next_stage.session(account, interactive=session.interactive) as stage:
            yield stage

    async def _converse(
        self, stream: SealedStream, session: OpenSession, limits: Limits, stage: StageSession | None
    ) -> None:
        """Answer the session's messages, one after another, until it ends."""
        transcript = None
        if session.transcript:
            described = Session.of(replace(self._info, session_id=session.id.hex()))
            transcript = CloudTranscript(described, self._identity)
        calls = self._calls.of(session, limits, stage, transcript)
        pings = Allowance(self._bounds.pings_per_minute, self._clock())
        try:
            if self._admission.stopped:
                session.end("draining")
            while True:
                received = await stream.receive(session.ending, calls.patience)
                if received is None:
                    if session.notice is not None:
                        await stream.send(session.notice)
                    return
                if isinstance(received, Oversized):
                    await calls.refuse(stream, received)
                    continue
                if isinstance(received.message, m.Goodbye):
                    session.why = "goodbye"
                    return
                if isinstance(received.message, m.SignTranscript):
                    await stream.send(calls.sign(received.message))
                    continue
                if isinstance(received.message, m.Ping) and not pings.take(self._clock()):
                    raise LimitError(f"more than {self._bounds.pings_per_minute} pings came within a minute")
                await calls.answer(stream, received)
        finally:
            calls.close()
