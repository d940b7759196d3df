"""The worker's data plane: a grpc.aio server whose streams carry sealed sessions.

One stream is one session. Frames are opened and sealed on the event loop (microseconds); spans run one at a time on a
compute thread, in the scheduler's order, so the health service answers all the while. Ray is not mentioned here: the
worker actor starts this server, and tests start it without one.

Draining: no new session is admitted, the calls in flight are answered, then every stream gets a `Goodbye` and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from isthmus.backbone.quantize import bytes_of
from isthmus.cloud.adapters import AdapterStore
from isthmus.cloud.computing import compute_threads
from isthmus.cloud.directory import Peer, Seat, better_place, newer_elsewhere, ranks, seats_elsewhere
from isthmus.cloud.dispatch import Shared, TooLate
from isthmus.cloud.executor import Executor
from isthmus.cloud.fault_points import reached
from isthmus.cloud.half_open import gives_way, host_of
from isthmus.cloud.logs import log
from isthmus.cloud.metrics import Metrics
from isthmus.cloud.pausing import CallThreads
from isthmus.cloud.pipeline import NextStage, StageSession
from isthmus.cloud.scheduler import Share
from isthmus.cloud.shelf import FileShelf
from isthmus.cloud.site_calls import SiteCalls
from isthmus.cloud.stream import SealedStream
from isthmus.cloud.tenant import TenantSession, handle_together, kind_of, step_together
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges, Tenant
from isthmus.protocol.errors import DrainingError, MessageError, PortInUseError, RemoteProtocolError, VersionError
from isthmus.protocol.keys import WorkerIdentity
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits
from isthmus.protocol.sealing import wipe
from isthmus.protocol.service import KEEPALIVE_MS, MAX_GRPC_MESSAGE_BYTES, METHOD, SERVICE
from isthmus.protocol.session import CloudSession, Oversized, Received

R = TypeVar("R")

HANDSHAKE_SECONDS = 10.0
MAX_HALF_OPEN = 64
MAX_STREAMS = 256
"""Of one connection: a proxy may have many edges on it."""
IDLE_MS = 60_000
ANSWER_SECONDS = 600.0
"""That an edge may take for its answer to a question in the middle of a call, which holds a thread and memory."""
GOODBYE_SECONDS = 2.0
"""For sessions to leave in a drain, once all calls are answered."""
NEWS_SECONDS = 2.0
"""For the next word of the other workers, whose sessions count against a tenant's quota."""
WORDS = 3
"""Of the other workers since a session was opened, before it may be ended as one too many.

What the third one tells was asked after the first had come, so it was open beside the session.
"""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM bytes of the outer TLS layer.

    The server's key and certificate chain, and a CA where clients must show a certificate.
    """

    key: bytes = field(repr=False)
    cert: bytes
    client_ca: bytes | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What the server serves: the model's description, the span, the files for the edges, and the tenants' adapters."""

    info: m.SessionInfo  # session_id is filled in per session
    executor: Executor
    parts: FileShelf
    adapters: AdapterStore
    package: FileShelf | None = None
    sites: bool = True  # whether edges may have adapters inside the span

    def session(
        self,
        session_id: bytes,
        tenant: Tenant,
        threads: CallThreads,
        limits: Limits = DEFAULT_LIMITS,
        *,
        batching: bool = True,
    ) -> TenantSession:
        """What answers the messages of one session; `threads` is where calls run that may pause."""
        shelves = {m.Shelf.PARTS: self.parts}
        if self.package is not None:
            shelves[m.Shelf.EMULATOR] = self.package
        return TenantSession(
            session_id,
            self.executor,
            shelves,
            self.adapters.of(tenant),
            SiteCalls(session_id, tenant, self.executor, threads, limits, self.sites, batching),
            self.info.hidden_size,
            self.info.limits.max_tokens_per_call,
            limits,
        )


@dataclass(slots=True, eq=False)
class _Open:
    """One admitted session, and how it is told to end."""

    id: bytes
    tenant: Tenant  # of a stage's key, with the name and weight of the tenant that the stage attaches for
    link: bytes  # the edge's name for its link: a reconnect carries the same one and fences the older session
    interactive: bool
    deadline: float | None  # seconds
    opened: float = field(default_factory=time.time)
    stage: StageSession | None = None  # with the pipeline's next stage, where there is one
    words: int = 0  # of the other workers that were heard since
    ending: str = "connection lost"
    farewell: m.Message | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seat(self) -> Seat:
        """What other workers are told of it."""
        return Seat(str(self.tenant.fingerprint), self.link.hex(), self.opened)

    def end(self, why: str, status: m.Status | None = None) -> None:
        """Ask the session to end after the call in flight. Its edge is told the status, or else why."""
        self.ending, self.farewell = why, status or m.Goodbye(why)
        self.ended.set()


class StripServer:
    """Serves one span to enrolled edges.

    Args:
        served: the span and what belongs to it.
        identity: the worker's key and its certificate, signed by the root key (which is not here).
        edges: returns the current `authorized_edges`; called at every handshake, so that an enrolment needs no restart.
        threads: torch threads for computing.
        batching: whether calls of several sessions may share a pass.
        next_stage: where calls go on, in a pipeline; None where this worker has the span's last layer.
        clock: seconds that never go back, by which deadlines are kept.
    """

    def __init__(
        self,
        served: Served,
        identity: WorkerIdentity,
        edges: Callable[[], AuthorizedEdges],
        threads: int,
        next_stage: NextStage | None = None,
        *,
        batching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self._clock = clock
        self._served = served
        self._identity = identity
        self._edges = edges
        self._next_stage = next_stage
        computing = compute_threads(
            served.executor, threads, batching=batching, computed=lambda reply: isinstance(reply, m.Timed)
        )
        self._compute, self._invariance = computing.dispatcher, computing.invariance
        self._call_threads = CallThreads(computing.threads_of_a_call)
        self._batching = batching
        self._open: dict[bytes, _Open] = {}
        # In the order in which the handshakes began, with the host that each is from.
        self._half_open: dict[asyncio.Timeout, tuple[str, CloudSession]] = {}
        self._in_flight = 0
        self._in_flight_bytes: Counter[str] = Counter()
        self._turns: list[asyncio.Future[None]] = []  # calls that wait until fewer bytes are in flight
        self._draining = False
        self._address = ""  # what edges are told; empty for a worker that has no peers
        self._peers: tuple[Peer, ...] = ()
        self._sent: Counter[str] = Counter()  # edges that were sent to a peer since it was heard of
        self._news = asyncio.Event()  # replaced at every word of the peers
        self._never = asyncio.Event()
        self._idle = asyncio.Event()  # no call is in flight
        self._idle.set()
        self._empty = asyncio.Event()  # no session is open
        self._empty.set()
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
        log("serving", listen=listen, port=port, model=self._served.info.model, plan=self._served.info.plan)
        return int(port)

    def hear(self, address: str, peers: Sequence[Peer]) -> None:
        """Take word of the cloud's other workers. For the server's event loop alone.

        Args:
            address: where edges find this worker.
            peers: the others.
        """
        self._address, self._peers = address, tuple(peers)
        self._sent.clear()
        for session in self._open.values():
            session.words += 1
            if newer_elsewhere(session.seat, peers):
                session.end("fenced")
        self._keep_quotas()
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _keep_quotas(self) -> None:
        """End the newest sessions of tenants that have opened too many at several workers at once."""
        rank = ranks([*self.seats(), *(seat for peer in self._peers for seat in peer.seats)])
        for session in self._open.values():
            seat = session.seat
            if session.words < WORDS or session.ended.is_set():
                continue
            if rank[seat.tenant, seat.link] >= session.tenant.quota.max_sessions:
                session.end("over quota", _over_quota(session.tenant, rank[seat.tenant, seat.link]))

    def shed(self, count: int) -> None:
        """End the newest sessions: their edges go on at workers with fewer. For the server's event loop alone."""
        settled = [session for session in self._open.values() if not session.ended.is_set()]
        for session in settled[max(0, len(settled) - count) :]:
            session.end("another worker has fewer sessions")

    def seats(self) -> tuple[Seat, ...]:
        """The sessions that are open. May be called from any thread."""
        return tuple(session.seat for session in self._open.copy().values() if not session.ended.is_set())

    async def drain(self, grace: float) -> bool:
        """Stop admitting sessions, answer the calls in flight, say goodbye.

        True if all were answered within `grace` seconds.
        """
        if self._server is None:
            return True
        log("draining", in_flight=self._in_flight, sessions=len(self._open))
        self._draining = True
        await self._health.enter_graceful_shutdown()
        for session in self._open.values():
            session.end("draining")
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
            finished = True
        except TimeoutError:
            finished = False
        await self._server.stop(grace=GOODBYE_SECONDS if finished else 0.0)
        if finished:  # the compute thread ends the calls that have paused, as their sessions leave
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), GOODBYE_SECONDS)
        self._compute.shutdown(cancel=not finished)
        log("stopped", all_answered=finished)
        return finished

    def status(self) -> dict[str, Any]:
        """What `isthmus cloud status` shows. May be called from any thread."""
        info, executor = self._served.info, self._served.executor
        waiting = self._compute.waiting()
        return {
            "state": "draining" if self._draining else "serving",
            "model": info.model,
            "plan": info.plan,
            "span_dtype": info.span_dtype,
            "span_bytes": self._span_bytes,
            "uptime_s": time.time() - self._started,
            "sessions": dict(Counter(session.tenant.name for session in self._open.copy().values())),
            "in_flight": self._in_flight,
            "waiting": dict(waiting),
            "calls_per_pass": self._compute.calls_per_pass,
            "same_bits_from": 0 if self._invariance is None else self._invariance.rows,
            "all_threads_from": 0 if self._invariance is None else self._invariance.threads,
            "calls_per_meeting": executor.host.meetings.calls_per_meeting,
            "queue_depth": sum(waiting.values()),
            "overdue": self._compute.overdue(),
            "deadlines": self.metrics.outcomes(),
            "stash_bytes": executor.used_bytes,
            "stash_budget_bytes": executor.stash_bytes,
            "graphs_evicted": executor.counters.graphs_evicted,
            "inputs_evicted": executor.counters.inputs_evicted,
            "recomputed": executor.counters.recomputed,
        }

    async def _session(self, frames: AsyncIterator[bytes], context: Any) -> None:
        """One stream: the handshake, then calls until either side ends it."""
        limits = Limits(max_message_bytes=self._served.info.limits.max_message_bytes)
        protocol = CloudSession(identity=self._identity, authorize=self._authorize, info=self._describe, limits=limits)
        stream = SealedStream(protocol, frames, context, self.metrics)
        try:
            session = await self._admit(protocol, stream, context)
            if session is not None and self._next_stage is None:
                await self._converse(stream, session, limits)
            elif session is not None and self._next_stage is not None:
                account = m.Account(session.tenant.name, session.tenant.quota.weight)
                async with self._next_stage.session(account, interactive=session.interactive) as session.stage:
                    await self._converse(stream, session, limits)
        except (RemoteProtocolError, VersionError) as error:
            log("protocol_error", tenant=None if protocol.tenant is None else protocol.tenant.name, error=str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the session's rules were broken")
        except grpc.aio.BaseError as error:  # the stream broke while it was written to
            log("stream_broke", error=type(error).__name__)
        except Exception as error:  # noqa: BLE001  # whatever it is, gRPC would send its text in the clear
            log("session_failed", logging.ERROR, error=type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "the session failed; the cloud's owner has a log of it")
        finally:
            protocol.close()

    async def _admit(self, protocol: CloudSession, stream: SealedStream, context: Any) -> _Open | None:
        """Handshake and `Attach`, in limited time and number; None where the edge is not admitted."""
        outcome = "failed"
        limit = asyncio.timeout(HANDSHAKE_SECONDS)
        try:
            async with limit:
                self._make_room()  # before anything is awaited: others come in meanwhile
                self._half_open[limit] = host_of(context.peer()), protocol
                await context.send_initial_metadata(())  # tells the edge that the stream is taken
                outcome = await stream.handshake()
                if outcome != "accepted" or protocol.info is None or protocol.tenant is None:
                    return None
                attach = await stream.receive(self._never)
                if attach is None:
                    outcome = "abandoned"
                    return None
                asked = attach.message if isinstance(attach, Received) else attach
                if not isinstance(asked, m.Attach):
                    raise MessageError(f"a session opens with Attach, not with {type(asked).__name__}")
                opened = bytes.fromhex(protocol.info.session_id)
                if asked.account is not None and not protocol.tenant.stage:
                    outcome = "refused"
                    await stream.send(m.Status(m.StatusCode.BAD_REQUEST, None, _NO_STAGE))
                    return None
                deadline = asked.deadline_ms / 1000 if asked.deadline_ms else None
                tenant = _served_for(protocol.tenant, asked.account)
                session = _Open(opened, tenant, asked.link, asked.interactive, deadline)
                known = (self._address, *(peer.address for peer in self._peers if peer.state != "draining"))
                elsewhere = None if asked.settled else self._better_place(session)
                if elsewhere is not None:
                    outcome = "sent elsewhere"
                    await stream.send(m.Workers(known, elsewhere))
                    return None
                refusal = await self._enter(session)
                if refusal is not None:
                    outcome = "refused"
                    await stream.send(refusal)
                    return None
                attached = m.Workers(known) if self._peers else m.Status(m.StatusCode.OK, None, "attached")
                try:
                    await stream.send(attached)
                except BaseException:
                    self._leave(session)
                    raise
                return session
        except TimeoutError:
            outcome = "timed out"
            return None
        finally:
            self._half_open.pop(limit, None)
            self.metrics.handshakes.labels(outcome).inc()
            if outcome != "accepted":
                log("session_refused", outcome=outcome)

    def _make_room(self) -> None:
        """For a handshake that begins: where as many are half open as may be, one gives way."""
        if len(self._half_open) < MAX_HALF_OPEN:
            return
        chosen = gives_way([(host, protocol.greeted) for host, protocol in self._half_open.values()])
        limit = list(self._half_open)[chosen]
        del self._half_open[limit]
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())

    def _better_place(self, session: _Open) -> str | None:
        """The address of a worker with fewer sessions than this one has without the newcomer."""
        own = sum(seat.link != session.link.hex() for seat in self.seats())
        address = better_place(own, self._peers, self._sent)
        if address is not None:
            self._sent[address] += 1
        return address

    async def _enter(self, session: _Open) -> m.Status | None:
        """Fence the link's older session, then count; a status where the tenant has too many sessions."""
        seat, allowed = session.seat, session.tenant.quota.max_sessions
        for tries_left in (2, 1, 0):
            mine = [other for other in self._open.values() if other.tenant.fingerprint == session.tenant.fingerprint]
            for other in mine:
                if other.link == session.link:
                    other.end("fenced")
            here = sum(other.ending != "fenced" for other in mine)
            count = here + seats_elsewhere(seat.tenant, seat.link, self._peers)
            if count < allowed:
                break
            if here >= allowed or not tries_left:
                return _over_quota(session.tenant, count)
            # What a peer has said is not the last word: a session may have ended there since.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), NEWS_SECONDS)
        self._open[session.id] = session
        self._empty.clear()
        self.metrics.sessions.set(len(self._open))
        log("session_opened", tenant=session.tenant.name, session=session.id.hex())
        return None

    def _leave(self, session: _Open) -> None:
        del self._open[session.id]
        self.metrics.sessions.set(len(self._open))
        if not self._open:
            self._empty.set()

    async def _converse(self, stream: SealedStream, session: _Open, limits: Limits) -> None:
        work = self._served.session(session.id, session.tenant, self._call_threads, limits, batching=self._batching)
        try:
            if self._draining:
                session.end("draining")
            while True:
                asked_at = work.calls.asked_at
                patience = None if asked_at is None else max(0.0, asked_at + ANSWER_SECONDS - time.monotonic())
                received = await stream.receive(session.ended, patience)
                if received is None and session.farewell is not None:
                    await stream.send(session.farewell)
                    return
                if received is None:
                    return
                if isinstance(received, Oversized):
                    await self._refuse(stream, work, session, received)
                    continue
                if isinstance(received.message, m.Goodbye):
                    session.ending = "goodbye"
                    return
                await self._answer(stream, work, session, received)
        finally:
            self._leave(session)
            # The stash belongs to the compute thread; the release waits its turn behind a call in flight. After a drain
            # that was cut short there is no thread any more, and no need.
            self._compute.cancel(session.id)
            with contextlib.suppress(RuntimeError):
                # A call in flight counts as answered when it ends: only then nothing of the session is left to forget.
                self._turn(session, work.close).add_done_callback(lambda _: self._compute.cancel(session.id))
            log("session_closed", tenant=session.tenant.name, session=session.id.hex(), ending=session.ending)

    async def _refuse(self, stream: SealedStream, work: TenantSession, session: _Open, refused: Oversized) -> None:
        """Say that a message is over its tenant's bytes in flight. A paused call whose answer it was is over."""
        stream.take_crypto_ns()  # counted for no call
        name, allowed = session.tenant.name, session.tenant.quota.max_inflight_bytes
        if refused.kind is m.SiteAnswer and refused.id is not None:
            await asyncio.wrap_future(self._turn(session, partial(work.calls.drop, refused.id.call)))
        self.metrics.refused.labels(m.StatusCode.OVER_QUOTA.name).inc()
        text = f"a call of {refused.size} bytes is over the {allowed} that {name} may have: send smaller batches"
        await stream.send(m.Status.saying(m.StatusCode.OVER_QUOTA, refused.id, text))

    async def _answer(self, stream: SealedStream, work: TenantSession, session: _Open, received: Received) -> None:
        due = self._due(session, received.message)
        reached("opened")
        crypto_ns = stream.take_crypto_ns()
        message, size, tenant = received.message, len(received.body), session.tenant
        operation = type(message).__name__.lower()
        self._in_flight += 1
        self._idle.clear()
        try:
            start = time.perf_counter_ns()
            await self._thread_for(work, session, received)
            try:
                async with self._room_for(tenant, size, received.body, due):
                    reply = await self._reply(work, session, received, due)
            except TooLate:
                self.metrics.deadlines.labels("refused").inc()
                reply = m.Status(m.StatusCode.TOO_LATE, getattr(message, "id", None), _too_late(session))
            elapsed = time.perf_counter_ns() - start
            if isinstance(reply, m.Timed):
                if due is not None:
                    self.metrics.deadlines.labels("met" if self._clock() <= due else "late").inc()
                self.metrics.seconds.labels(operation).observe(reply.compute_ns / 1e9)
                if isinstance(message, m.Forward | m.Backward):
                    self.metrics.tokens.labels(operation).inc(_positions(message))
                queue_ns = max(0, elapsed - reply.compute_ns)
                priority = "interactive" if session.interactive else "training"
                self.metrics.waited.labels(priority).observe(queue_ns / 1e9)
                reply = dataclasses.replace(reply, crypto_ns=crypto_ns, queue_ns=queue_ns)
            elif isinstance(reply, m.Status):
                self.metrics.refused.labels(reply.code.name).inc()
            self._observe_stash()
            if reply is not None:
                await stream.send(reply)
            reached("reply_sent")
            self.metrics.calls.labels(operation).inc()
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _due(self, session: _Open, message: m.Message) -> float | None:
        """By when a message that has just come in has to be computed, on the server's clock; None for no deadline."""
        if session.deadline is None or session.stage is not None or kind_of(message) is None:
            return None
        return self._clock() + session.deadline

    async def _reply(
        self, work: TenantSession, session: _Open, received: Received, due: float | None
    ) -> m.Message | None:
        """Have a message answered by this worker, and by the stages behind it where there are any."""
        if session.stage is None and isinstance(received.message, m.Sites):
            wipe(received.body)
            return await self._bind(work, session, received.message)
        if session.stage is None:
            return await asyncio.wrap_future(self._submit(work, session, received, due))
        try:  # parts of the body go on to the next stage, so it is overwritten when all have answered
            return await session.stage.answer(
                received.message,
                lambda message: asyncio.wrap_future(self._submit(work, session, Received(message, bytearray()))),
            )
        finally:
            wipe(received.body)

    async def _bind(self, work: TenantSession, session: _Open, message: m.Sites) -> m.Message | None:
        """Have a list of sites answered, which holds no tensors, in pieces, between which others have their turns."""
        pieces = work.bind(message)
        answer: m.Message | None = None
        while answer is None:
            answer = await asyncio.wrap_future(self._turn(session, partial(next, pieces)))
        return answer

    async def _thread_for(self, work: TenantSession, session: _Open, received: Received) -> None:
        """Have a call with sites that begins wait until there is a thread for it, after those that came before it.

        One whose session has paused calls does not wait: others wait for the threads of these.
        """
        message = received.message
        sited = isinstance(message, m.Forward | m.Backward) and message.sites and session.stage is None
        if not sited or work.calls.paused:
            return
        try:
            await asyncio.wrap_future(work.calls.claim().ready)
        except asyncio.CancelledError:  # the edge is gone; the thread is given back with its session
            wipe(received.body)
            raise

    @contextlib.asynccontextmanager
    async def _room_for(self, tenant: Tenant, size: int, body: bytearray, due: float | None) -> AsyncIterator[None]:
        """Count a call against the tenant's bytes in flight, after the calls that it does not fit beside.

        Raises TooLate where that lasts until it is due.
        """
        name, allowed = tenant.name, tenant.quota.max_inflight_bytes
        try:
            async with asyncio.timeout(None if due is None else due - self._clock()):
                while (beside := self._in_flight_bytes[name]) and beside + size > allowed * self._part(tenant):
                    turn = asyncio.get_running_loop().create_future()
                    self._turns.append(turn)
                    await turn
        except TimeoutError:
            wipe(body)
            raise TooLate from None
        except asyncio.CancelledError:  # the edge is gone
            wipe(body)
            raise
        self._in_flight_bytes[name] += size
        try:
            yield
        finally:
            self._in_flight_bytes[name] -= size
            turns, self._turns = self._turns, []
            for turn in turns:
                if not turn.done():
                    turn.set_result(None)

    def _part(self, tenant: Tenant) -> float:
        """The part of a tenant's quotas that is this worker's to give: that of its sessions which are here."""
        here = sum(other.tenant.fingerprint == tenant.fingerprint for other in self._open.values())
        return here / (here + seats_elsewhere(str(tenant.fingerprint), "", self._peers)) if here else 1.0

    def _share(self, tenant: Tenant) -> Share:
        """Of the compute threads' time."""
        rate = tenant.quota.max_tokens_per_second
        return Share(tenant.quota.weight, None if rate is None else rate * self._part(tenant))

    def _turn(
        self,
        session: _Open,
        run: Callable[[], R],
        positions: int = 0,
        shared: Shared[Any, R] | None = None,
        deadline: float | None = None,
        *,
        continues: bool = False,
    ) -> Future[R]:
        """Have something done by the compute thread when it is the tenant's turn."""
        return self._compute.submit(
            run,
            tenant=session.tenant.name,
            owner=session.id,
            share=self._share(session.tenant),
            interactive=session.interactive,
            positions=positions,
            shared=shared,
            deadline=deadline,
            continues=continues,
        )

    def _submit(
        self, work: TenantSession, session: _Open, received: Received, due: float | None = None
    ) -> Future[m.Message | None]:
        """Have a message handled by the compute thread, and its body overwritten, also where nobody waits any more."""
        message, kind, in_pass = received.message, work.kind_of(received.message), kind_of(received.message) is not None
        shared: Shared[Any, m.Message | None] | None = None
        if kind is not None:
            shared = Shared(kind, (work, message), handle_together if in_pass else step_together)
        try:
            running = self._turn(
                session,
                partial(work.handle, message),
                work.calls.positions(message) if isinstance(message, m.SiteAnswer) else _positions(message),
                shared,
                None if due is None else due - self._clock(),
                continues=isinstance(message, m.SiteAnswer),
            )
        except RuntimeError:  # a drain was cut short
            wipe(received.body)
            raise
        # What is needed longer, the executor has copied.
        running.add_done_callback(lambda _: wipe(received.body))
        reached("queued")
        return running

    def _observe_stash(self) -> None:
        executor = self._served.executor
        self.metrics.stash_bytes.set(executor.used_bytes)
        self.metrics.evictions.set(executor.counters.graphs_evicted)
        self.metrics.recomputed.set(executor.counters.recomputed)

    def _authorize(self, public_key: bytes) -> Tenant:
        if self._draining:
            raise DrainingError("the cloud is draining and takes no new session: connect again in a moment")
        return self._edges().require(public_key)

    def _describe(self, tenant: Tenant, session_id: bytes) -> m.SessionInfo:
        return dataclasses.replace(self._served.info, session_id=session_id.hex())


def _over_quota(tenant: Tenant, others: int) -> m.Status:
    """Why there is no place for a session of a tenant beside his others."""
    allowed = tenant.quota.max_sessions
    text = f"{others} sessions of {tenant.name} are open, {allowed} are allowed: close one"
    return m.Status.saying(m.StatusCode.OVER_QUOTA, None, text)


_NO_STAGE = (
    "only a stage of a pipeline, with the key that `isthmus cloud serve` made for it, may attach for another tenant: "
    "attach without an account"
)


def _served_for(tenant: Tenant, account: m.Account | None) -> Tenant:
    """Whose turns a session takes: those of the tenant that a stage attaches for, within the stage's own quota."""
    if account is None:
        return tenant
    quota = dataclasses.replace(tenant.quota, weight=account.weight)
    return dataclasses.replace(tenant, name=account.tenant, quota=quota)


def _too_late(session: _Open) -> str:
    return (
        f"it could not be computed within {session.deadline} s: ask again when fewer others do, or allow it more time"
    )


def _positions(message: m.Message) -> int:
    """Token positions that a message wants computed."""
    if not isinstance(message, m.Forward | m.Backward):
        return 0
    sent = message.hidden if isinstance(message, m.Forward) else message.gradient
    return sent.shape[0] * sent.shape[1]
