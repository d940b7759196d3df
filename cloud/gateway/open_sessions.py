"""The sessions that are open at a worker, beside those that the cloud's other workers have reported.

A tenant's quota of sessions counts its sessions at all workers, and a link has one session in the whole cloud. Reports
of other workers are a little old when they arrive, so a session that is one too many may be found, and ended, only
after it was opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from isthmus.cloud.directory import Peer, SessionEntry, less_loaded, newer_elsewhere, ranks, sessions_elsewhere
from isthmus.cloud.telemetry.event_history import record
from isthmus.cloud.telemetry.logs import log
from isthmus.cloud.telemetry.metrics import Metrics
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import AuthorizedEdges, Tenant

REPORT_SECONDS = 2.0
"""How long a new session waits for the next report of the other workers, where it is over its tenant's quota.

The controller's rounds are 0.5 s apart, and wait up to 1 s for a worker that does not answer.
"""
FENCED = "fenced"
"""Why a session ends whose link has opened a newer one."""
REPORTS = 3
"""Reports of the other workers since a session was opened, before it may be ended as one too many.

The third report was asked for after the first had come, so the sessions in it were open beside this one.
"""


@dataclass(slots=True, eq=False)
class OpenSession:
    """One admitted session. It is open, then *ending* after the call in flight (`end`), or *cut* at once (`cut`).

    Attributes:
        id: its id.
        tenant: whose turns it takes. For a stage's key this is the tenant that the stage attaches for.
        link: the edge's name for its link. A reconnect carries the same name, and ends (fences) the older session.
        interactive: whether somebody waits for its calls.
        deadline: seconds within which a call must be computed; None for no deadline.
        enrolled: the line of `authorized_edges` that let it in.
        transcript: whether a transcript of its calls is kept.
        since: when it was opened, on the server's clock.
        opened: the same in Unix seconds, for other workers.
        reports: reports of the other workers that have come since.
        why: why it ends, for the log.
        notice: what its edge is sent at the end.
        ending: set once it has to end.
        fenced: whether it ends because its link has opened a newer one.
        cutoff: the timeout under which it is served, which `cut` lets expire.
    """

    id: bytes
    tenant: Tenant
    link: bytes
    interactive: bool
    deadline: float | None
    enrolled: Tenant
    since: float = 0.0
    transcript: bool = False
    opened: float = field(default_factory=time.time)
    reports: int = 0
    why: str = "connection lost"
    notice: m.Message | None = None
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    fenced: bool = False
    cutoff: asyncio.Timeout | None = None

    @property
    def entry(self) -> SessionEntry:
        """What is reported of it to other workers."""
        return SessionEntry(str(self.tenant.fingerprint), self.link.hex(), self.opened)

    def end(self, why: str, status: m.Status | None = None) -> None:
        """Have the session end after the call in flight. The first call counts, later ones do nothing.

        Args:
            why: for the log, and for the edge where there is no status.
            status: what the edge is sent.
        """
        if self.ending.is_set():
            return
        self.why, self.notice, self.fenced = why, status or m.Goodbye(why), why == FENCED
        self.ending.set()
        record("ended", session=self.id.hex(), why=why)

    def cut(self) -> None:
        """End the session at once, in the middle of a call. To be called after `end`, which says why."""
        if self.cutoff is not None and not self.cutoff.expired():
            self.cutoff.reschedule(asyncio.get_running_loop().time())


class Sessions:
    """The open sessions of one worker. For the server's event loop alone, where nothing else is said."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._open: dict[bytes, OpenSession] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._address = ""  # where edges find it; empty for a worker that has no peers
        self._peers: tuple[Peer, ...] = ()
        self._sent: Counter[str] = Counter()  # edges that were sent to a peer since its last report
        self._next_report = asyncio.Event()  # replaced at every report

    def __len__(self) -> int:
        return len(self._open)

    def entries(self) -> tuple[SessionEntry, ...]:
        """The sessions that are not ending. May be called from any thread."""
        return tuple(session.entry for session in self._open.copy().values() if not session.ending.is_set())

    def by_tenant(self) -> dict[str, int]:
        """How many each tenant has. May be called from any thread."""
        return dict(Counter(session.tenant.name for session in self._open.copy().values()))

    @property
    def alone(self) -> bool:
        """Whether the cloud has no other worker."""
        return not self._peers

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where edges find this worker and those of the others that do not drain, each address once."""
        others = (peer.address for peer in self._peers if peer.state != "draining")
        return tuple(dict.fromkeys((self._address, *others)))  # behind a load balancer they are the same

    def take_report(self, address: str, peers: Sequence[Peer]) -> None:
        """Take a report of the cloud's other workers.

        Args:
            address: where edges find this worker.
            peers: the others.
        """
        self._address, self._peers = address, tuple(peers)
        self._sent.clear()
        record("heard")
        for session in self._open.values():
            session.reports += 1
            if newer_elsewhere(session.entry, peers):
                session.end(FENCED)
        self._keep_quotas()
        arrived, self._next_report = self._next_report, asyncio.Event()
        arrived.set()

    def less_loaded(self, session: OpenSession) -> str | None:
        """The address of a worker to send a new session to, as it has fewer; None where there is none.

        An edge is not sent to a worker of the same address: which of the two it reaches, a load balancer decides.
        """
        own = sum(entry.link != session.link.hex() for entry in self.entries())
        others = [peer for peer in self._peers if peer.address != self._address]
        address = less_loaded(own, others, self._sent)
        if address is not None:
            self._sent[address] += 1
        return address

    async def enter(self, session: OpenSession) -> m.Status | None:
        """Fence the link's older session, then count this one; a status where its tenant has too many sessions."""
        entry, allowed = session.entry, session.tenant.quota.max_sessions
        for tries_left in (2, 1, 0):
            mine = [other for other in self._open.values() if other.tenant.fingerprint == session.tenant.fingerprint]
            for other in mine:
                if other.link == session.link:
                    other.end(FENCED)
            here = sum(not other.ending.is_set() for other in mine)
            count = here + sessions_elsewhere(entry.tenant, entry.link, self._peers)
            if count < allowed:
                break
            if here >= allowed or not tries_left:
                return _over_quota(session.tenant, count)
            # A session that a peer has reported may have ended since: the next report shows it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._next_report.wait(), REPORT_SECONDS)
        self._open[session.id] = session
        self._empty.clear()
        self._metrics.sessions.set(len(self._open))
        record("opened", session=session.id.hex(), link=session.link.hex(), tenant=entry.tenant, allowed=allowed)
        log("session_opened", tenant=session.tenant.name, session=session.id.hex())
        return None

    def leave(self, session: OpenSession) -> None:
        """Count a session no longer."""
        del self._open[session.id]
        self._metrics.sessions.set(len(self._open))
        if not self._open:
            self._empty.set()
        record("closed", session=session.id.hex())
        log("session_closed", tenant=session.tenant.name, session=session.id.hex(), ending=session.why)

    def end_newest(self, count: int) -> None:
        """End the newest sessions: their edges go on at workers with fewer."""
        staying = [session for session in self._open.values() if not session.ending.is_set()]
        for session in staying[max(0, len(staying) - count) :]:
            session.end("another worker has fewer sessions")

    def review(self, edges: AuthorizedEdges, now: float, max_age: float, *, names_matter: bool = True) -> None:
        """End the sessions whose enrolment was removed or changed, and those that are too old.

        They end between two calls, and their edges may open others. A session whose edge is not enrolled at all is cut
        off in the middle of a call, if it is still open at the next review.

        Args:
            edges: who is enrolled now.
            now: on the server's clock.
            max_age: seconds that a session may last.
            names_matter: whether another name is a change of the enrolment; not where names are numbers that are given
                anew.
        """
        for session in self._open.values():
            enrolled = edges.of(session.enrolled.fingerprint)
            if enrolled is not None and not names_matter:
                enrolled = replace(enrolled, name=session.enrolled.name)
            if enrolled is None and session.ending.is_set():
                session.cut()
            elif enrolled is None:
                session.end("this key is no longer enrolled")
            elif enrolled != session.enrolled:
                session.end("the key's enrolment has changed")
            elif now - session.since >= max_age:
                session.end("the session has reached its greatest age")

    def end_all(self, why: str) -> None:
        """End all of them."""
        for session in self._open.values():
            session.end(why)

    async def all_left(self) -> None:
        """Wait until none is open."""
        await self._empty.wait()

    def fraction_of(self, tenant: Tenant) -> float:
        """This worker's fraction of a tenant's quotas: that of the tenant's sessions that are here."""
        here = sum(other.tenant.fingerprint == tenant.fingerprint for other in self._open.values())
        return here / (here + sessions_elsewhere(str(tenant.fingerprint), "", self._peers)) if here else 1.0

    def _keep_quotas(self) -> None:
        """End the newest sessions of tenants that have opened too many at several workers at once."""
        rank = ranks([*self.entries(), *(entry for peer in self._peers for entry in peer.sessions)])
        for session in self._open.values():
            entry = session.entry
            if session.reports < REPORTS or session.ending.is_set():
                continue
            if rank[entry.tenant, entry.link] >= session.tenant.quota.max_sessions:
                session.end("over quota", _over_quota(session.tenant, rank[entry.tenant, entry.link]))


def _over_quota(tenant: Tenant, others: int) -> m.Status:
    """Why a tenant gets no further session beside the `others`."""
    allowed = tenant.quota.max_sessions
    text = f"{others} sessions of {tenant.name} are open, {allowed} are allowed: close one"
    return m.Status.saying(m.StatusCode.OVER_QUOTA, None, text)
