"""Which streams become sessions: handshakes in limited time, number and rate, and the `Attach` that follows."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from isthmus.cloud.gateway.half_open import HalfOpen, accept_call, host_of
from isthmus.cloud.gateway.open_sessions import OpenSession, Sessions
from isthmus.cloud.gateway.penalties import Penalties
from isthmus.cloud.gateway.stream import SealedStream
from isthmus.cloud.telemetry.logs import log
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.common.errors import DrainingError, MessageError, RemoteProtocolError, VersionError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges, Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.keys import WorkerIdentity
from isthmus.protocol.session import CloudSession, Received


class Admission:
    """Decides which streams become sessions.

    Args:
        info: the description that edges get of the model; each session fills in its id.
        identity: returns the worker's key and its certificate; called at every handshake.
        edges: returns the current `authorized_edges`; called at every handshake.
        sessions: those that are open.
        metrics: where handshakes are counted.
        half_open: limits handshakes.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        info: m.SessionInfo,
        identity: Callable[[], WorkerIdentity],
        edges: Callable[[], AuthorizedEdges],
        sessions: Sessions,
        metrics: Metrics,
        half_open: HalfOpen,
        clock: Callable[[], float],
    ) -> None:
        self._info = info
        self._identity = identity
        self._edges = edges
        self._sessions = sessions
        self._metrics = metrics
        self._clock = clock
        self._penalties = Penalties(clock)
        self._half_open = half_open
        self._never = asyncio.Event()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether nobody is admitted any more. May be asked from any thread."""
        return self._stopped

    def stop(self) -> None:
        """Admit nobody any more."""
        self._stopped = True

    def protocol(self, limits: Limits) -> CloudSession:
        """The protocol's state of a stream that begins."""
        return CloudSession(identity=self._identity(), authorize=self._authorize, info=self._describe, limits=limits)

    async def admit(self, protocol: CloudSession, stream: SealedStream, context: Any) -> OpenSession | None:
        """Handshake and `Attach`, in limited time and number; None where the edge is not admitted.

        Args:
            protocol: the state of the stream.
            stream: what drives it.
            context: the stream's grpc.aio context.

        Raises:
            RemoteProtocolError: the edge broke the session's rules.
        """
        outcome, host = "failed", host_of(context.peer())
        broken: Exception | None = None
        try:
            async with self._half_open.place(host, lambda: protocol.greeted):
                await accept_call(context)
                try:
                    outcome = await stream.handshake()
                except (RemoteProtocolError, VersionError) as error:
                    broken, pause = error, self._penalties.pause(host)
                    self._penalties.offended(host)  # before the wait, which may be cut short
                    await asyncio.sleep(pause)  # who breaks the rules waits, not who comes next
                    raise
                if outcome == "refused" and not self._stopped:  # an edge that comes during a drain broke no rule
                    self._penalties.offended(host)
                    await asyncio.sleep(self._penalties.pause(host))
                if outcome != "accepted" or protocol.info is None or protocol.tenant is None:
                    return None
                outcome = "failed"
                await asyncio.sleep(self._penalties.pause(str(protocol.tenant.fingerprint)))
                first = await stream.receive(self._never)
                if first is None:
                    outcome = "abandoned"
                    return None
                attach = first.message if isinstance(first, Received) else first
                if not isinstance(attach, m.Attach):
                    raise MessageError(f"a session opens with Attach, not with {type(attach).__name__}")
                session = self._session(bytes.fromhex(protocol.info.session_id), protocol.tenant, attach)
                outcome, answer = await self._decide(session, attach)
                try:
                    await stream.send(answer)
                except BaseException:
                    if outcome == "accepted":
                        self._sessions.leave(session)
                        outcome = "failed"
                    raise
                return session if outcome == "accepted" else None
        except TimeoutError:
            if broken is not None:
                raise broken from None
            outcome = "timed out"
            return None
        finally:
            self._metrics.handshakes.labels(outcome).inc()
            if outcome != "accepted":
                log("session_refused", outcome=outcome)

    def _session(self, session_id: bytes, enrolled: Tenant, attach: m.Attach) -> OpenSession:
        """The session that an enrolled edge asks for. It is not counted yet."""
        return OpenSession(
            session_id,
            _served_for(enrolled, attach.account),
            attach.link,
            attach.interactive,
            attach.deadline_ms / 1000 if attach.deadline_ms else None,
            enrolled,
            self._clock(),
            attach.transcript,
        )

    async def _decide(self, session: OpenSession, attach: m.Attach) -> tuple[str, m.Message]:
        """Whether a session is opened here, and what its edge is answered. It is counted where it is "accepted"."""
        if attach.account is not None and not session.enrolled.stage:
            return "refused", m.Status(m.StatusCode.BAD_REQUEST, None, _NO_STAGE)
        addresses = self._sessions.addresses
        elsewhere = None if attach.settled else self._sessions.less_loaded(session)
        if elsewhere is not None:
            return "sent elsewhere", m.Workers(addresses, elsewhere)
        refusal = await self._sessions.enter(session)
        if refusal is not None:
            return "refused", refusal
        if self._sessions.alone:
            return "accepted", m.Status(m.StatusCode.OK, None, "attached")
        return "accepted", m.Workers(addresses)

    def offended(self, protocol: CloudSession) -> None:
        """Count an offence of the stream's tenant. Where none is known yet, `admit` has counted it for the host."""
        if protocol.tenant is not None:
            self._penalties.offended(str(protocol.tenant.fingerprint))

    def _authorize(self, public_key: bytes) -> Tenant:
        if self._stopped:
            raise DrainingError("the cloud is draining and takes no new session: connect again in a moment")
        return self._edges().require(public_key)

    def _describe(self, tenant: Tenant, session_id: bytes) -> m.SessionInfo:
        return dataclasses.replace(self._info, session_id=session_id.hex())


_NO_STAGE = (
    "only another worker of this cloud, a stage of its pipeline, may attach for another tenant: "
    "attach without an account"
)


def _served_for(tenant: Tenant, account: m.Account | None) -> Tenant:
    """The tenant whose turns a session takes: the one that a stage attaches for, with the stage's own quota."""
    if account is None:
        return tenant
    quota = dataclasses.replace(tenant.quota, weight=account.weight)
    return dataclasses.replace(tenant, name=account.tenant, quota=quota)
