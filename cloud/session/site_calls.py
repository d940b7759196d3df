"""A session's calls that visit the edge's sites: lists of sites, calls that have paused, and the edge as a visitor."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from isthmus.backbone.runtime.leased_lora import LeasedWeights
from isthmus.backbone.runtime.shared_linears import Company, Enlisted, Products
from isthmus.backbone.runtime.site_visit import BoundSites, SiteMatrices
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.cloud.engine.executor import Executor, Guests
from isthmus.cloud.engine.paused_batches import Asked, Outcome, SitedCall, Step, first_kind, next_kind
from isthmus.cloud.engine.paused_calls import CallThread, CallThreads, Pause, PausingCall
from isthmus.cloud.engine.requests import Kind
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Role, codec_by_id, decode, encode

MAX_PAUSED = 8
"""Calls of one session that may have paused at a time."""

Call = m.Forward | m.Backward
Ask = Callable[[m.SiteQuestion], Any]
Work = Callable[[Guests], m.Message]


@dataclass(frozen=True, slots=True)
class _Lease:
    number: int
    sites: int  # the number of their list
    weights: Mapping[int, LeasedWeights]


@dataclass(slots=True, eq=False)
class _Begun:
    """A call that has begun: where it will pause, and what it has asked last."""

    message: Call
    call: SitedCall
    company: Company | None
    pauses: Mapping[int, int]  # see `BoundSites`
    asked: tuple[m.SitePhase, int] | None = None  # the phase, and the first site
    asked_at: float | None = None  # monotonic

    @property
    def kind(self) -> Kind:
        """That of its next step."""
        if self.asked is None:
            return first_kind(self.message)
        phase, site = self.asked
        return next_kind(phase, self.pauses[site])


@dataclass(slots=True)
class SiteCalls:
    """Runs calls of one session, with pauses where they visit sites.

    Args:
        session_id: the session's id, which keys its entries in the stash.
        tenant: whose session it is.
        executor: the span.
        threads: where calls run that may pause.
        limits: what the session accepts.
        allowed: whether there may be sites at all.
        batching: whether calls may be computed together with those of other sessions.
    """

    session_id: bytes
    tenant: Tenant
    executor: Executor
    threads: CallThreads
    limits: Limits
    allowed: bool = True
    batching: bool = True
    _lists: dict[int, BoundSites] = field(default_factory=dict)
    # As long as anything holds them: a list, a call that has paused, or a forward state.
    _matrices: WeakValueDictionary[SiteSpec, SiteMatrices] = field(default_factory=WeakValueDictionary)
    _thread: CallThread | None = None  # claimed for a call that has not begun yet
    _lease: _Lease | None = None
    _begun: dict[int, _Begun] = field(default_factory=dict)

    @property
    def paused(self) -> bool:
        """Whether a call waits for the edge. The event loop may ask."""
        return bool(self._begun)

    @property
    def asked_at(self) -> float | None:
        """Since when, by the monotonic clock, the edge has owed its oldest answer; None where it owes none.

        The event loop may ask while no call of the session is computed.
        """
        return min((at for begun in self._begun.values() if (at := begun.asked_at) is not None), default=None)

    def bind(self, message: m.Sites) -> Iterator[m.Status | None]:
        """Remember a list of sites; the oldest goes if there are too many.

        It is done in pieces: each makes the matrices of one site and gives None, the last gives the answer. Sites of
        other lists that are the same have the same matrices.

        Raises:
            ConfigError: a rank or a width does not fit.
            PlanError: the span has no such site.
            ValueError: the cloud's owner wants none.
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
        bound = host.bind(message.entries, made)
        if message.number not in self._lists and len(self._lists) >= m.MAX_LISTS:
            del self._lists[next(iter(self._lists))]
        self._lists[message.number] = bound
        yield m.Status(m.StatusCode.OK, None, f"{len(message.entries)} sites")

    def lease(self, message: m.Lease) -> m.Status:
        """Take weights on loan, in the place of those before.

        Raises:
            LookupError: the session has no such list of sites.
            ValueError: they do not fit its leased sites.
        """
        sites = self._lists.get(message.sites)
        if sites is None:
            raise LookupError(f"there is no list {message.sites} of sites in this session: send it first")
        leased = [site for site, spec in enumerate(sites.specs) if spec.on_loan]
        if len(leased) != len(message.weights):
            raise ValueError(f"{len(message.weights)} loans for {len(leased)} leased sites: one for each is needed")
        weights = {}
        for site, lent in zip(leased, message.weights, strict=True):
            n_in, n_out = self.executor.host.widths(sites.specs[site])
            if (lent.up.shape[0], lent.down.shape[1]) != (n_out, n_in):
                raise ValueError(
                    f"lent matrices of shapes {list(lent.down.shape)} and {list(lent.up.shape)} do not fit site "
                    f"{sites.specs[site]}: [r, {n_in}] and [{n_out}, r] are needed"
                )
            what = f"a matrix lent to site {sites.specs[site]}"
            down, up = (
                decode(each, limits=self.limits, what=what).to(self.executor.device, self.executor.dtype, copy=True)
                for each in (lent.down, lent.up)
            )
            trained = sites.specs[site].placement == Placement.LEASED
            weights[site] = LeasedWeights(down.requires_grad_(trained), up.requires_grad_(trained), lent.scale)
        self._return_lease()
        self._lease = _Lease(message.number, message.sites, weights)
        return m.Status(m.StatusCode.OK, None, f"{len(weights)} leased sites")

    def kind(self, message: Call | m.SiteAnswer) -> Kind | None:
        """What the step that a message leads to is taken together with; None for nothing. The event loop may ask."""
        if not self.batching:
            return None
        if isinstance(message, m.SiteAnswer):
            begun = self._begun.get(message.id.call)
            return None if begun is None else begun.kind
        return first_kind(message) if message.sites in self._lists else None

    def positions(self, message: m.SiteAnswer) -> int:
        """Token positions of the call that an answer lets go on; 0 if it has not asked. The event loop may ask."""
        begun = self._begun.get(message.id.call)
        return 0 if begun is None else _shape(begun.message)[:2].numel()

    def widths(self, number: int) -> tuple[int, int]:
        """What the sites of a list have of each token position, for `CallShape`: what is kept, and what passes."""
        sites = self._lists.get(number)
        return (0, 0) if sites is None else self._widths_of(sites)

    def _widths_of(self, sites: BoundSites) -> tuple[int, int]:
        features, host = Counter[int](), self.executor.host
        kept = 0
        for number, spec in enumerate(sites.specs):
            n_in, n_out = host.widths(spec)
            if spec.asks:
                features[sites.pauses[number]] += n_in + n_out
            elif spec.placement != Placement.TAP:
                kept += n_in  # the gradient of what is lent needs the input
        tapped = sum(self._taps_of(sites))
        # A question's tensors, its message, the answers and copies of these: of one group at a time.
        return kept + tapped, 2 * max(features.values(), default=0) + tapped

    def taps(self, number: int) -> tuple[int, ...]:
        """The widths of what the taps of a list give."""
        sites = self._lists.get(number)
        return () if sites is None else self._taps_of(sites)

    def _taps_of(self, sites: BoundSites) -> tuple[int, ...]:
        full = self.executor.host.span.hidden_size
        return tuple(spec.rank or full for spec in sites.specs if spec.placement == Placement.TAP)

    def claim(self, nbytes: int = 0) -> CallThread:
        """The thread of the call that begins next, which may wait for it. The event loop may ask.

        A session whose calls have paused does not wait: they hold threads that others wait for.

        Args:
            nbytes: What the call takes until it ends.

        Raises:
            ValueError: it takes more than a tenant may have.
        """
        if self._thread is None:
            self._thread = self.threads.claim(self.tenant.name, nbytes)
        return self._thread

    def begin(self, message: Call, work: Work, nbytes: int = 0) -> Step:
        """Have the first step of a call with sites ready, which takes `nbytes` until it ends.

        Raises:
            LookupError: the session has no such list of sites, or no such lease.
            ValueError: too many calls have paused, no thread is there, or the call takes too much memory.
        """
        thread, self._thread = self.claim(nbytes), None
        try:
            sites, leased = self._needed(message)
            if not thread.ready.done():
                raise ValueError(
                    f"call {message.id.call} cannot begin: no thread is free, and {len(self._begun)} have "
                    "paused, answer them first"
                )
        except (LookupError, ValueError):
            thread.give_back()
            raise

        def run(ask: Callable[[Asked], Any]) -> m.Message:
            return work(Guests(sites, _Edge(self.executor, sites, message, self.limits, ask), leased, company))

        call: SitedCall = PausingCall(run, thread)
        company = Company(cast("Callable[[Enlisted], Products | RuntimeError]", call.ask)) if self.batching else None
        self._begun[message.id.call] = _Begun(message, call, company, sites.pauses)
        return self._step(message.id.call, None)

    def answer(self, message: m.SiteAnswer) -> Step:
        """Have the next step of a call that has asked ready.

        Raises:
            LookupError: it has not.
        """
        if message.id.call not in self._begun:
            raise LookupError(f"call {message.id.call} has not asked anything")
        return self._step(message.id.call, message)

    def take(self, step: Step) -> m.Message:
        """Take a step of this session alone: the question at its end, or what came of the call.

        Raises:
            ValueError: the answer does not fit the question.
        """
        try:
            outcome = step.resume(step.answer, beside=False)
        except BaseException:
            self.ended(step)
            raise
        return self.settle(step, outcome)

    def settle(self, step: Step, outcome: Outcome) -> m.Message:
        """Note what came of a step; returns it, with the time that the step took."""
        spent = step.call.busy_ns - step.since_ns
        if not isinstance(outcome, Pause):
            self.ended(step)
            return dataclasses.replace(outcome, compute_ns=spent) if isinstance(outcome, m.Timed) else outcome
        question = outcome.question
        if not isinstance(question, m.SiteQuestion):
            raise RuntimeError("a step cannot end where its call waits for others")
        begun = self._begun[step.number]
        begun.asked, begun.asked_at = (question.phase, question.sites[0]), time.monotonic()
        return dataclasses.replace(question, compute_ns=spent)

    def ended(self, step: Step) -> None:
        """Forget a call that is over."""
        del self._begun[step.number]

    def drop(self, number: int) -> None:
        """End a call, if it has paused: its answer will not come."""
        begun = self._begun.pop(number, None)
        if begun is not None:
            begun.call.abandon()

    def close(self) -> None:
        """End what has paused, claim no thread any longer, and overwrite what was lent."""
        if self._thread is not None:
            self._thread.give_back()
            self._thread = None
        for number in list(self._begun):
            self.drop(number)
        self._return_lease()

    def _needed(self, message: Call) -> tuple[BoundSites, Mapping[int, LeasedWeights]]:
        """The list of sites of a call that begins, and what is lent for it. Raises what `begin` raises."""
        sites = self._lists.get(message.sites)
        if sites is None:
            raise LookupError(f"there is no list {message.sites} of sites in this session: send it first")
        if message.id.call in self._begun or len(self._begun) >= MAX_PAUSED:
            raise ValueError(f"call {message.id.call} cannot begin: {len(self._begun)} have paused, answer them first")
        return sites, self._lent(message, sites)

    def _lent(self, message: Call, sites: BoundSites) -> Mapping[int, LeasedWeights]:
        """The weights of the lease that a call names, which its leased sites need."""
        needs = any(spec.on_loan for spec in sites.specs)
        lease = self._lease
        if not needs:
            return {}
        if lease is None or lease.number != message.lease or lease.sites != message.sites:
            raise LookupError(f"there is no lease {message.lease} of list {message.sites} here: send it first")
        return lease.weights

    def _return_lease(self) -> None:
        """Overwrite what was lent. Forwards whose backward has not come hold the same tensors: they are forgotten."""
        if self._lease is None:
            return
        self.executor.forget_leased(self.session_id)
        for lent in self._lease.weights.values():
            lent.down.detach().zero_()
            lent.up.detach().zero_()
        self._lease = None

    def _step(self, number: int, answer: m.SiteAnswer | None) -> Step:
        begun = self._begun[number]
        return Step(number, begun.call, begun.company, answer, begun.call.busy_ns)


@dataclass(frozen=True, slots=True)
class _Edge:
    """The edge as a visitor: what a site is asked becomes a question on the wire."""

    executor: Executor
    sites: BoundSites
    message: Call
    limits: Limits
    ask: Ask

    def forward(self, sites: Sequence[int], inputs: Sequence[Tensor] | None) -> list[Tensor]:
        """See `isthmus.backbone.runtime.site_visit.Visitor`. Sites that share an input share its tensor on the wire."""
        phase = m.SitePhase.AGAIN if inputs is None else m.SitePhase.FORWARD
        answers = self._answers(phase, sites, list({id(x): x.detach() for x in inputs or ()}.values()), Role.ACTIVATION)
        if len(answers) != len(sites):
            raise ValueError(f"{len(answers)} contributions for {len(sites)} sites: one for each is needed")
        for site, answer in zip(sites, answers, strict=True):
            self._check(answer, site, self.executor.host.widths(self.sites.specs[site])[1])
        return answers

    def backward(self, sites: Sequence[int], gradients: Sequence[Tensor], *, wanted: bool) -> list[Tensor | None]:
        """See `Visitor` of the runtime. One gradient may stand for all sites that share an input."""
        phase = m.SitePhase.BACKWARD if wanted else m.SitePhase.BACKWARD_ONLY
        answers = self._answers(phase, sites, gradients, Role.GRADIENT)
        if not wanted:
            if answers:
                raise ValueError(f"{len(answers)} gradients came that nobody wanted")
            return []
        alike = [site for site in sites if self.sites.specs[site].placement == Placement.EDGE]
        answered = [site for site in sites if site not in alike[1:]] if len(answers) < len(sites) else list(sites)
        if len(answers) != len(answered):
            raise ValueError(f"{len(answers)} gradients for {len(sites)} sites: one for each, or one for an input")
        for site, answer in zip(answered, answers, strict=True):
            self._check(answer, site, self.executor.host.widths(self.sites.specs[site])[0])
        found = dict(zip(answered, answers, strict=True))
        return [found.get(site) for site in sites]

    def _answers(self, phase: m.SitePhase, sites: Sequence[int], tensors: Sequence[Tensor], role: Role) -> list[Tensor]:
        codec = codec_by_id(self.message.reply_codec).name
        named = ", ".join(str(self.sites.specs[site]) for site in sites)
        sent = tuple(encode(tensor, codec, role, f"what goes to sites {named}") for tensor in tensors)
        answer = self.ask(m.SiteQuestion(self.message.id, phase, tuple(sites), sent, 0, 0, 0))
        if answer.id != self.message.id:
            raise ValueError(
                f"an answer of attempt {answer.id.attempt} came to a question of {self.message.id.attempt}"
            )
        if any(payload.role != role for payload in answer.tensors):
            raise ValueError(f"an answer to a question of phase {phase.name} carries tensors of another role")
        # Contributions are rounded to the span's dtype once they are added. Copies: the message's own bytes are
        # overwritten when its turn is over.
        dtype = torch.float32 if role == Role.ACTIVATION else self.executor.dtype
        device = self.executor.device
        what = f"an answer of sites {named}"
        return [decode(each, limits=self.limits, what=what).to(device, dtype, copy=True) for each in answer.tensors]

    def _check(self, answer: Tensor, site: int, width: int) -> None:
        hidden = _shape(self.message)
        if answer.shape != (*hidden[:2], width):
            raise ValueError(
                f"an answer of shape {list(answer.shape)} does not fit site {self.sites.specs[site]}: "
                f"{[*hidden[:2], width]} is needed"
            )


def _shape(message: Call) -> torch.Size:
    """That of the hidden states that go through the span, `[B, S, h]`."""
    return torch.Size((message.hidden if isinstance(message, m.Forward) else message.gradient).shape)
