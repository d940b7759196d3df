"""The sessions that are open at a worker, beside those that the cloud's other workers have told of.

A tenant's quota of sessions counts them wherever they are, and a link has one session in the whole cloud. What the
others have told is a little old when it is heard, so a session that it makes one too many is ended afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.cloud.directory import Peer, Seat, better_place, newer_elsewhere, ranks, seats_elsewhere
from isthmus.cloud.telemetry.event_history import record
from isthmus.cloud.telemetry.logs import log
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges, Tenant

NEWS_SECONDS = 2.0
"""For the next word of the other workers, whose sessions count against a tenant's quota."""
FENCED = "fenced"
"""Why a session ends whose link has opened another one."""
WORDS = 3
"""Of the other workers since a session was opened, before it may be ended as one too many.

What the third one tells was asked after the first had come, so it was open beside the session.
"""


@dataclass(slots=True, eq=False)
class OpenSession:
    """One admitted session, and how it is told to end."""

    id: bytes
    tenant: Tenant  # of a stage's key, with the name and weight of the tenant that the stage attaches for
    link: bytes  # the edge's name for its link: a reconnect carries the same one and fences the older session
    interactive: bool
    deadline: float | None  # seconds
    enrolled: Tenant  # the line of `authorized_edges` that let it in
    since: float = 0.0  # on the server's clock
    opened: float = field(default_factory=time.time)
    words: int = 0  # of the other workers that were heard since
    ending: str = "connection lost"
    farewell: m.Message | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    leash: asyncio.Timeout | None = None  # under which it converses; it ends the session when that is cut off

    @property
    def fenced(self) -> bool:
        """Whether its link has a newer one."""
        return self.ended.is_set() and self.ending == FENCED

    @property
    def seat(self) -> Seat:
        """What other workers are told of it."""
        return Seat(str(self.tenant.fingerprint), self.link.hex(), self.opened)

    def end(self, why: str, status: m.Status | None = None) -> None:
        """Ask the session to end after the call in flight. Its edge is told the status, or else why: the first one."""
        if self.ended.is_set():
            return
        self.ending, self.farewell = why, status or m.Goodbye(why)
        self.ended.set()
        record("ended", session=self.id.hex(), why=why)

    def cut(self) -> None:
        """End the session now, with its call in flight. After `end`, which says why."""
        if self.leash is not None and not self.leash.expired():
            self.leash.reschedule(asyncio.get_running_loop().time())


class Sessions:
    """The open sessions of one worker. For the server's event loop alone, where nothing else is said."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._open: dict[bytes, OpenSession] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._address = ""  # what edges are told; empty for a worker that has no peers
        self._peers: tuple[Peer, ...] = ()
        self._sent: Counter[str] = Counter()  # edges that were sent to a peer since it was heard of
        self._news = asyncio.Event()  # replaced at every word of the peers

    def __len__(self) -> int:
        return len(self._open)

    def seats(self) -> tuple[Seat, ...]:
        """Those that have not been told to end. May be called from any thread."""
        return tuple(session.seat for session in self._open.copy().values() if not session.ended.is_set())

    def by_tenant(self) -> dict[str, int]:
        """How many each tenant has. May be called from any thread."""
        return dict(Counter(session.tenant.name for session in self._open.copy().values()))

    @property
    def alone(self) -> bool:
        """Whether the cloud has no other worker."""
        return not self._peers

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where edges find this worker, and the others but for those that drain."""
        return (self._address, *(peer.address for peer in self._peers if peer.state != "draining"))

    def hear(self, address: str, peers: Sequence[Peer]) -> None:
        """Take word of the cloud's other workers.

        Args:
            address: where edges find this worker.
            peers: the others.
        """
        self._address, self._peers = address, tuple(peers)
        self._sent.clear()
        record("heard")
        for session in self._open.values():
            session.words += 1
            if newer_elsewhere(session.seat, peers):
                session.end(FENCED)
        self._keep_quotas()
        news, self._news = self._news, asyncio.Event()
        news.set()

    def better_place(self, session: OpenSession) -> str | None:
        """The address of a worker with fewer sessions than this one has without the newcomer, who is sent there."""
        own = sum(seat.link != session.link.hex() for seat in self.seats())
        address = better_place(own, self._peers, self._sent)
        if address is not None:
            self._sent[address] += 1
        return address

    async def enter(self, session: OpenSession) -> m.Status | None:
        """Fence the link's older session, then count; a status where the tenant has too many sessions."""
        seat, allowed = session.seat, session.tenant.quota.max_sessions
        for tries_left in (2, 1, 0):
            mine = [other for other in self._open.values() if other.tenant.fingerprint == session.tenant.fingerprint]
            for other in mine:
                if other.link == session.link:
                    other.end(FENCED)
            here = sum(not other.ended.is_set() for other in mine)
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
        self._metrics.sessions.set(len(self._open))
        record("opened", session=session.id.hex(), link=session.link.hex(), tenant=seat.tenant, allowed=allowed)
        log("session_opened", tenant=session.tenant.name, session=session.id.hex())
        return None

    def leave(self, session: OpenSession) -> None:
        """Count a session no longer."""
        del self._open[session.id]
        self._metrics.sessions.set(len(self._open))
        if not self._open:
            self._empty.set()
        record("closed", session=session.id.hex())
        log("session_closed", tenant=session.tenant.name, session=session.id.hex(), ending=session.ending)

    def shed(self, count: int) -> None:
        """End the newest ones: their edges go on at workers with fewer."""
        settled = [session for session in self._open.values() if not session.ended.is_set()]
        for session in settled[max(0, len(settled) - count) :]:
            session.end("another worker has fewer sessions")

    def review(self, edges: AuthorizedEdges, now: float, max_age: float) -> None:
        """End those whose edge is no longer enrolled, or otherwise than when it came, and those that are too old.

        They end between two calls, and their edges may open others. Only one whose edge is no longer enrolled is cut
        off in the middle of a call, at the next review.

        Args:
            edges: who is enrolled now.
            now: on the server's clock.
            max_age: seconds that a session may last.
        """
        for session in self._open.values():
            enrolled = edges.of(session.enrolled.fingerprint)
            if enrolled is None and session.ended.is_set():
                session.cut()
            elif enrolled is None:
                session.end("this edge is no longer enrolled")
            elif enrolled != session.enrolled:
                session.end("the edge's enrolment has changed")
            elif now - session.since >= max_age:
                session.end("the session has reached its greatest age")

    def end_all(self, why: str) -> None:
        """End all of them."""
        for session in self._open.values():
            session.end(why)

    async def all_left(self) -> None:
        """Wait until none is open."""
        await self._empty.wait()

    def part_of(self, tenant: Tenant) -> float:
        """The part of a tenant's quotas that is this worker's to give: that of its sessions which are here."""
        here = sum(other.tenant.fingerprint == tenant.fingerprint for other in self._open.values())
        return here / (here + seats_elsewhere(str(tenant.fingerprint), "", self._peers)) if here else 1.0

    def _keep_quotas(self) -> None:
        """End the newest sessions of tenants that have opened too many at several workers at once."""
        rank = ranks([*self.seats(), *(seat for peer in self._peers for seat in peer.seats)])
        for session in self._open.values():
            seat = session.seat
            if session.words < WORDS or session.ended.is_set():
                continue
            if rank[seat.tenant, seat.link] >= session.tenant.quota.max_sessions:
                session.end("over quota", _over_quota(session.tenant, rank[seat.tenant, seat.link]))


def _over_quota(tenant: Tenant, others: int) -> m.Status:
    """Why there is no place for a session of a tenant beside his others."""
    allowed = tenant.quota.max_sessions
    text = f"{others} sessions of {tenant.name} are open, {allowed} are allowed: close one"
    return m.Status.saying(m.StatusCode.OVER_QUOTA, None, text)
