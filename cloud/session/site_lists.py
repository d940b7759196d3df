"""What an edge has declared in a session: its lists of sites, and the weights that it leases to the cloud."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.runtime.sited_pass import BoundSites, SiteMatrices
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.cloud.engine.executor import Executor
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import decode


@dataclass(frozen=True, slots=True)
class SiteList:
    """A list of sites, and what every call through them needs.

    Attributes:
        sites: the sites, bound to the span's modules.
        places: where a call pauses for them, in running order; see `BoundSites.pauses`.
        kept: numbers that the sites keep of each token position, for `CallShape`.
        passing: numbers of each token position that they have for a while, for `CallShape`.
        tap_widths: widths of what its taps give.
    """

    sites: BoundSites
    places: tuple[int, ...]
    kept: int
    passing: int
    tap_widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Lease:
    number: int
    list_number: int
    weights: Mapping[int, LeasedLora]  # by site


@dataclass(slots=True)
class SiteLists:
    """The lists of sites and the lease of one session.

    Args:
        session_id: the session's id, which keys its entries in the activation cache.
        tenant: whose session it is.
        executor: the span.
        limits: what the session accepts.
        allowed: whether this cloud takes sites at all.
    """

    session_id: bytes
    tenant: Tenant
    executor: Executor
    limits: Limits
    allowed: bool
    _lists: dict[int, SiteList] = field(default_factory=dict)
    # Matrices live as long as anything holds them: a list, a paused call, or a forward state.
    _matrices: WeakValueDictionary[SiteSpec, SiteMatrices] = field(default_factory=WeakValueDictionary)
    _lease: _Lease | None = None

    def bind(self, message: m.Sites) -> Iterator[m.Status | None]:
        """Remember a list of sites, in the place of the oldest one if there are too many.

        It takes several steps, between which other sessions have their turns: each makes the matrices of one site and
        yields None, the last one yields the answer. Equal sites of several lists share their matrices.

        Raises:
            ConfigError: a rank or a width does not fit.
            PlanError: the span has no such site.
            ValueError: the cloud's owner allows no sites.
        """
        if not self.allowed:
            raise ValueError(
                "this cloud takes no adapters inside its layers (`serve --no-sites`): adapt the edge's own layers"
            )
        host, most = self.executor.host, self.tenant.quota.max_inflight_bytes
        nbytes = sum(map(host.matrix_bytes, {*self._matrices, *message.entries}))
        if nbytes > most:
            text = (
                f"the matrices of the session's low-rank sites and taps would take {nbytes} bytes, over the {most} "
                f"that {self.tenant.name} may have in flight: use a lower rank or fewer sites, or ask the cloud's "
                "owner for a larger max-bytes-in-flight"
            )
            yield m.Status.saying(m.StatusCode.OVER_QUOTA, None, text)
            return
        made = dict(self._matrices.items())
        for spec in message.entries:
            known = host.known_matrices(spec)
            matrices = None if spec in made else known or host.matrices(spec)
            if matrices is not None:
                made[spec] = self._matrices[spec] = matrices
                if known is None:
                    yield None
        bound = _site_list(host, host.bind(message.entries, made))
        if message.number not in self._lists and len(self._lists) >= m.MAX_LISTS:
            del self._lists[next(iter(self._lists))]
        self._lists[message.number] = bound
        yield m.Status(m.StatusCode.OK, None, f"{len(message.entries)} sites")

    def of(self, number: int) -> SiteList:
        """The list of a number. Raises LookupError where the session has none."""
        found = self._lists.get(number)
        if found is None:
            raise LookupError(f"there is no list {number} of sites in this session: send it first")
        return found

    def find(self, number: int) -> SiteList | None:
        """The list of a number, or None. The event loop may ask."""
        return self._lists.get(number)

    def lease(self, message: m.Lease) -> m.Status:
        """Take the edge's weights for the leased sites of a list, in the place of those before.

        Raises:
            LookupError: the session has no such list of sites.
            ValueError: they do not fit its leased sites.
        """
        specs = self.of(message.sites).sites.specs
        leased = [site for site, spec in enumerate(specs) if spec.is_leased]
        if len(leased) != len(message.weights):
            raise ValueError(f"{len(message.weights)} leases for {len(leased)} leased sites: one for each is needed")
        weights = {site: self._copied(specs[site], sent) for site, sent in zip(leased, message.weights, strict=True)}
        self.end_lease()
        self._lease = _Lease(message.number, message.sites, weights)
        return m.Status(m.StatusCode.OK, None, f"{len(weights)} leased sites")

    def leased_at(self, message: m.Decode) -> Mapping[tuple[int, str], LeasedLora]:
        """The weights that are leased for a decode call, by layer and linear.

        Raises:
            LookupError: Its list of sites or its lease is not here.
            ValueError: A site of the list is not leased: it would ask the edge at every token.
        """
        if not message.sites:
            return {}
        sites = self.of(message.sites).sites
        for spec in sites.specs:
            if not spec.is_leased or not spec.part:
                raise ValueError(f"site {spec} is not leased: a decode call takes leased adapters only")
        return {
            (sites.specs[site].layer, sites.specs[site].part): lora
            for site, lora in self.leased_for(message, sites).items()
        }

    def leased_for(self, message: m.Forward | m.Backward | m.Decode, sites: BoundSites) -> Mapping[int, LeasedLora]:
        """The weights that a call's leased sites compute with. Raises LookupError where its lease is not here."""
        if not any(spec.is_leased for spec in sites.specs):
            return {}
        lease = self._lease
        if lease is None or (lease.number, lease.list_number) != (message.lease, message.sites):
            raise LookupError(f"there is no lease {message.lease} of list {message.sites} here: send it first")
        return lease.weights

    def end_lease(self) -> None:
        """Overwrite the leased weights. Kept forwards that hold the same tensors are forgotten."""
        if self._lease is None:
            return
        self.executor.cache.release(self.session_id, lambda entry: any(spec.is_leased for spec in entry.specs))
        for weights in self._lease.weights.values():
            weights.down.detach().zero_()
            weights.up.detach().zero_()
        self._lease = None

    def _copied(self, spec: SiteSpec, sent: m.LeasedWeights) -> LeasedLora:
        """A copy of what the edge has sent for a leased site: the message's own bytes are overwritten soon."""
        n_in, n_out = self.executor.host.widths(spec)
        if (sent.up.shape[0], sent.down.shape[1]) != (n_out, n_in):
            raise ValueError(
                f"leased matrices of shapes {list(sent.down.shape)} and {list(sent.up.shape)} do not fit site {spec}: "
                f"[r, {n_in}] and [{n_out}, r] are needed"
            )
        down, up = (
            decode(each, limits=self.limits, what=f"a matrix leased for site {spec}")
            .to(self.executor.device, self.executor.dtype, copy=True)
            .requires_grad_(spec.placement == Placement.LEASED)
            for each in (sent.down, sent.up)
        )
        return LeasedLora(down, up, sent.scale)


def _site_list(host: SiteHost, sites: BoundSites) -> SiteList:
    asked = Counter[int]()  # numbers of each token position, by the place of their question
    kept = 0
    for number, spec in enumerate(sites.specs):
        n_in, n_out = host.widths(spec)
        if spec.asks:
            asked[sites.pauses[number]] += n_in + n_out
        elif spec.placement != Placement.TAP:
            kept += n_in  # the gradient of a leased matrix needs the site's input
    taps = tuple(spec.rank or host.span.hidden_size for spec in sites.specs if spec.placement == Placement.TAP)
    # A question's tensors, its message, the answers and copies of these: of one group of sites at a time.
    passing = 2 * max(asked.values(), default=0) + sum(taps)
    return SiteList(sites, tuple(sorted(set(sites.pauses.values()))), kept + sum(taps), passing, taps)
