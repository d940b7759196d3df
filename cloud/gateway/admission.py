"""Who may enter: handshakes, in limited time, number and rate, and what an edge says as it attaches."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from isthmus.cloud.gateway.half_open import HalfOpen, host_of, tell_taken
from isthmus.cloud.gateway.open_sessions import OpenSession, Sessions
from isthmus.cloud.gateway.penalties import Penalties
from isthmus.cloud.gateway.stream import SealedStream
from isthmus.cloud.telemetry.logs import log
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.common.errors import DrainingError, MessageError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges, Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.secure.keys import WorkerIdentity
from isthmus.protocol.session import CloudSession, Received


class Admission:
    """Decides which streams become sessions.

    Args:
        info: what edges are told; the session's id is filled in.
        identity: returns the worker's key and its certificate; called at every handshake.
        edges: returns the current `authorized_edges`; called at every handshake.
        sessions: those that are open.
        metrics: where handshakes are counted.
        half_open: the places of handshakes.
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
        try:
            async with self._half_open.place(host, lambda: protocol.greeted):
                await tell_taken(context)
                await asyncio.sleep(self._penalties.pause(host))
                shaken = await stream.handshake()
                if shaken == "refused" and not self._stopped:  # whoever is told to come back has done nothing wrong
                    self.offended(protocol, context)
                if shaken != "accepted" or protocol.info is None or protocol.tenant is None:
                    outcome = shaken
                    return None
                await asyncio.sleep(self._penalties.pause(str(protocol.tenant.fingerprint)))
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
                session = OpenSession(
                    opened, tenant, asked.link, asked.interactive, deadline, protocol.tenant, self._clock()
                )
                known = self._sessions.addresses
                elsewhere = None if asked.settled else self._sessions.better_place(session)
                if elsewhere is not None:
                    outcome = "sent elsewhere"
                    await stream.send(m.Workers(known, elsewhere))
                    return None
                refusal = await self._sessions.enter(session)
                if refusal is not None:
                    outcome = "refused"
                    await stream.send(refusal)
                    return None
                attached = m.Status(m.StatusCode.OK, None, "attached") if self._sessions.alone else m.Workers(known)
                try:
                    await stream.send(attached)
                except BaseException:
                    self._sessions.leave(session)
                    raise
                outcome = "accepted"
                return session
        except TimeoutError:
            outcome = "timed out"
            return None
        finally:
            self._metrics.handshakes.labels(outcome).inc()
            if outcome != "accepted":
                log("session_refused", outcome=outcome)

    def offended(self, protocol: CloudSession, context: Any) -> None:
        """A stream has broken the rules: its tenant has, where it has said who it is, else somebody at its host."""
        tenant = protocol.tenant
        self._penalties.offended(host_of(context.peer()) if tenant is None else str(tenant.fingerprint))

    def _authorize(self, public_key: bytes) -> Tenant:
        if self._stopped:
            raise DrainingError("the cloud is draining and takes no new session: connect again in a moment")
        return self._edges().require(public_key)

    def _describe(self, tenant: Tenant, session_id: bytes) -> m.SessionInfo:
        return dataclasses.replace(self._info, session_id=session_id.hex())


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
