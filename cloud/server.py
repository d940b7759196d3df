"""The worker's data plane: a grpc.aio server whose streams carry sealed sessions.

One stream is one session. Frames are opened and sealed on the event loop (microseconds); spans run one at a time on a
compute thread, in the scheduler's order, so the health service answers all the while. Ray is not mentioned here: the
worker actor starts this server, and tests start it without one.

Draining: no new session is admitted, the calls in flight are answered, then every stream gets a `Goodbye` and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from isthmus.backbone.quantize import bytes_of
from isthmus.cloud.admission import Admission
from isthmus.cloud.calls import Calls
from isthmus.cloud.logs import log
from isthmus.cloud.metrics import Metrics
from isthmus.cloud.pipeline import NextStage, StageSession
from isthmus.cloud.served import Served
from isthmus.cloud.sessions import OpenSession, Sessions
from isthmus.cloud.stream import SealedStream
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges
from isthmus.protocol.errors import PortInUseError, RemoteProtocolError, VersionError
from isthmus.protocol.keys import WorkerIdentity
from isthmus.protocol.limits import Limits
from isthmus.protocol.service import KEEPALIVE_MS, MAX_GRPC_MESSAGE_BYTES, METHOD, SERVICE
from isthmus.protocol.session import Oversized

MAX_STREAMS = 256
"""Of one connection: a proxy may have many edges on it."""
IDLE_MS = 60_000
GOODBYE_SECONDS = 2.0
"""For sessions to leave in a drain, once all calls are answered."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM bytes of the outer TLS layer.

    The server's key and certificate chain, and a CA where clients must show a certificate.
    """

    key: bytes = field(repr=False)
    cert: bytes
    client_ca: bytes | None = None


class StripServer:
    """Serves one span to enrolled edges.

    Args:
        served: the span and what belongs to it.
        identity: returns the worker's key and its certificate, signed by the root key (which is not here); called at
            every handshake, so that a renewed certificate needs no restart.
        edges: returns the current `authorized_edges`; called at every handshake, so that an enrolment needs no restart.
        threads: torch threads for computing.
        batching: whether calls of several sessions may share a pass.
        next_stage: where calls go on, in a pipeline; None where this worker has the span's last layer.
        clock: seconds that never go back, by which deadlines are kept.

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
        batching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self.sessions = Sessions(self.metrics)
        self.metrics.certificate.set_function(lambda: identity().certificate.not_after)
        self._identity = identity
        self._info = served.info
        self._next_stage = next_stage
        self._admission = Admission(served.info, identity, edges, self.sessions, self.metrics, clock)
        self._calls = Calls(served, threads, self.sessions.part_of, self.metrics, batching=batching, clock=clock)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._started = time.time()
        self._span_bytes = bytes_of(served.executor.host.span)

    async def start(self, listen: str, tls: ServerTls | None) -> int:
        """Listen on `host:port` and return the port. Raises PortInUseError."""
        options = [
            ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a lottery
            ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.server_handshake_timeout_ms", KEEPALIVE_MS),
            ("grpc.max_connection_idle_ms", IDLE_MS),  # without a stream
        ]
        server = grpc.aio.server(options=options)
        # No serializers: a gRPC message is a frame, and a frame is bytes.
        session = grpc.stream_stream_rpc_method_handler(self._session)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, {METHOD.rsplit("/", 1)[1]: session})]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            if tls is None:
                port = server.add_insecure_port(listen)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(tls.key, tls.cert)], tls.client_ca, require_client_auth=tls.client_ca is not None
                )
                port = server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise PortInUseError(f"cannot listen on {listen}: {error}") from None
        await server.start()
        self._server = server
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log("serving", listen=listen, port=port, model=self._info.model, plan=self._info.plan)
        return int(port)

    async def drain(self, grace: float) -> bool:
        """Stop admitting sessions, answer the calls in flight, say goodbye.

        True if all were answered within `grace` seconds.
        """
        if self._server is None:
            return True
        log("draining", in_flight=self._calls.in_flight.calls, sessions=len(self.sessions))
        self._admission.stop()
        await self._health.enter_graceful_shutdown()
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
        return {
            "state": "draining" if self._admission.stopped else "serving",
            "model": self._info.model,
            "plan": self._info.plan,
            "span_dtype": self._info.span_dtype,
            "span_bytes": self._span_bytes,
            "uptime_s": time.time() - self._started,
            "certificate_not_after": self._identity().certificate.not_after,
            "sessions": self.sessions.by_tenant(),
            **self._calls.status(),
        }

    async def _session(self, frames: AsyncIterator[bytes], context: Any) -> None:
        """One stream: the handshake, then calls until either side ends it."""
        limits = Limits(max_message_bytes=self._info.limits.max_message_bytes)
        protocol = self._admission.protocol(limits)
        stream = SealedStream(protocol, frames, context, self.metrics)
        try:
            session = await self._admission.admit(protocol, stream, context)
            if session is not None:
                try:
                    async with self._stage_of(session) as stage:
                        await self._converse(stream, session, limits, stage)
                finally:
                    self.sessions.leave(session)
        except (RemoteProtocolError, VersionError) as error:
            self._admission.offended(protocol, context)
            log("protocol_error", tenant=None if protocol.tenant is None else protocol.tenant.name, error=str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the session's rules were broken")
        except grpc.aio.BaseError as error:  # the stream broke while it was written to
            log("stream_broke", error=type(error).__name__)
        except Exception as error:  # noqa: BLE001  # whatever it is, gRPC would send its text in the clear
            log("session_failed", logging.ERROR, error=type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "the session failed; the cloud's owner has a log of it")
        finally:
            protocol.close()

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
        calls = self._calls.of(session, limits, stage)
        try:
            if self._admission.stopped:
                session.end("draining")
            while True:
                received = await stream.receive(session.ended, calls.patience)
                if received is None and session.farewell is not None:
                    await stream.send(session.farewell)
                    return
                if received is None:
                    return
                if isinstance(received, Oversized):
                    await calls.refuse(stream, received)
                    continue
                if isinstance(received.message, m.Goodbye):
                    session.ending = "goodbye"
                    return
                await calls.answer(stream, received)
        finally:
            calls.close()
