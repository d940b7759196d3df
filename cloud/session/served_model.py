"""What a worker serves: the span, and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.file_store import FileShelf
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.site_calls import SiteCalls
from isthmus.cloud.session.tenant_adapters import AdapterStore
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits


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
        shelves = {m.FileSet.PARTS: self.parts}
        if self.package is not None:
            shelves[m.FileSet.EMULATOR] = self.package
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
