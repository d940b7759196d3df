"""What a worker serves: the span, and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isthmus.backbone.decoding.decode_pass import DecodePass
from isthmus.backbone.split.span import FrozenSpan
from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.cloud.decoding.decode_calls import Decoding
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.session.handler import OfferedPackage, TenantSession
from isthmus.cloud.session.site_calls import SiteCalls
from isthmus.cloud.session.site_lists import SiteLists
from isthmus.cloud.session.tenant_adapters import AdapterStore
from isthmus.cloud.session.token_counts import TokenCounts
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import DEFAULT_LIMITS, Limits


@dataclass(frozen=True, slots=True)
class Served:
    """The model's description, the span, the files for the edges, and the tenants' adapters.

    Attributes:
        info: the description that edges get of the model; each session fills in its id.
        executor: the span.
        parts: the edge's parts of the model.
        adapters: the tenants' adapters.
        tokens: how many tokens were computed for tenants who may have so many in all.
        packages: the packages with emulators that are offered, by name.
        middles: the layers that these stand for, of each plan that is not the span's own.
        sites: whether edges may have adapters inside the span.
        cache_bytes: budget of the keys and values of all sessions that generate.
        model: makes the files of the whole model, for the cloud's other workers; None where it is not offered to them.
    """

    info: m.SessionInfo
    executor: Executor
    parts: FileStore
    adapters: AdapterStore
    tokens: TokenCounts
    packages: Mapping[str, OfferedPackage] = field(default_factory=dict)
    middles: Mapping[str, FrozenSpan] = field(default_factory=dict)
    sites: bool = True
    cache_bytes: int = 1 << 30
    model: Callable[[], FileStore | m.Status] | None = None

    def decoding(self, rows: int | None = None, options: EngineOptions | None = None) -> Decoding:
        """What the decode calls of several sessions share; see there, and `DecodePass` for `rows`."""
        step_tokens = (options or EngineOptions()).prefill_tokens
        return Decoding(
            self.executor, DecodePass(self.executor.host.span, rows), CachePool(self.cache_bytes), step_tokens
        )

    def session(
        self,
        session_id: bytes,
        tenant: Tenant,
        threads: CallThreads,
        limits: Limits = DEFAULT_LIMITS,
        *,
        batching: bool = True,
        decoding: Decoding | None = None,
        of_worker: bool = False,
    ) -> TenantSession:
        """What answers the messages of one session.

        Its calls with sites run on `threads`, and its decode calls share `decoding` with those of others, if any. One
        that is `of_worker` is with another worker of this cloud, which may fetch more.
        """
        stores: dict[m.FileSet, Callable[[], FileStore | m.Status]] = {m.FileSet.PARTS: lambda: self.parts}
        if of_worker:
            stores[m.FileSet.ADAPTERS] = self.adapters.shared_files
            if self.model is not None:
                stores[m.FileSet.MODEL] = self.model
        lists = SiteLists(session_id, tenant, self.executor, limits, self.sites)
        return TenantSession(
            session_id,
            self.executor,
            stores,
            self.adapters.of(tenant),
            SiteCalls(lists, threads, batching),
            decoding or self.decoding(),
            self.info.hidden_size,
            self.info.limits.max_tokens_per_call,
            limits,
            self.packages,
            self.middles,
        )
