"""A session's calls that visit the edge's sites: lists of sites, calls that have paused, and the edge as a visitor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.backbone.site_spec import Placement
from isthmus.backbone.site_visit import BoundSites, LeasedWeights
from isthmus.cloud.executor import Executor, Guests
from isthmus.cloud.pausing import CallThreads, Pause, PausingCall
from isthmus.protocol import messages as m
from isthmus.protocol.codecs import Role, codec_by_id, decode, encode
from isthmus.protocol.limits import Limits

MAX_PAUSED = 8
"""Calls of one session that may have paused at a time."""

Ask = Callable[[m.SiteQuestion], m.SiteAnswer]
Work = Callable[[Guests | None], m.Message]


@dataclass(frozen=True, slots=True)
class _Lease:
    number: int
    sites: int  # the number of their list
    weights: Mapping[int, LeasedWeights]


@dataclass(slots=True)
class SiteCalls:
    """Runs calls of one session, with pauses where they visit sites.

    Args:
        session_id: the session's id, which keys its entries in the stash.
        executor: the span.
        threads: where calls run that may pause.
        limits: what the session accepts.
        allowed: whether there may be sites at all.
    """

    session_id: bytes
    executor: Executor
    threads: CallThreads
    limits: Limits
    allowed: bool = True
    _lists: dict[int, BoundSites] = field(default_factory=dict)
    _lease: _Lease | None = None
    _paused: dict[int, PausingCall[m.SiteQuestion, m.SiteAnswer, m.Message]] = field(default_factory=dict)

    @property
    def paused(self) -> bool:
        """Whether a call waits for the edge. The event loop may ask."""
        return bool(self._paused)

    def bind(self, message: m.Sites) -> m.Status:
        """Remember a list of sites; the oldest goes if there are too many.

        Raises:
            PlanError: the span has no such site.
            ValueError: the cloud's owner wants none.
        """
        if not self.allowed:
            raise ValueError(
                "this cloud takes no adapters inside its layers (`serve --no-sites`): adapt the edge's own layers"
            )
        bound = self.executor.host.bind(message.entries)
        if message.number not in self._lists and len(self._lists) >= m.MAX_LISTS:
            del self._lists[next(iter(self._lists))]
        self._lists[message.number] = bound
        return m.Status(m.StatusCode.OK, None, f"{len(message.entries)} sites")

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
            down, up = (
                decode(each, limits=self.limits).to(self.executor.dtype, copy=True) for each in (lent.down, lent.up)
            )
            trained = sites.specs[site].placement == Placement.LEASED
            weights[site] = LeasedWeights(down.requires_grad_(trained), up.requires_grad_(trained), lent.scale)
        self._return_lease()
        self._lease = _Lease(message.number, message.sites, weights)
        return m.Status(m.StatusCode.OK, None, f"{len(weights)} leased sites")

    def begin(self, message: m.Forward | m.Backward, work: Work) -> m.Message:
        """Do a call's work, up to its end or its first question. One without sites has no question to ask.

        Raises:
            LookupError: the session has no such list of sites.
            ValueError: too many calls have paused.
        """
        if not message.sites:
            return work(None)
        sites = self._lists.get(message.sites)
        if sites is None:
            raise LookupError(f"there is no list {message.sites} of sites in this session: send it first")
        if message.id.call in self._paused or len(self._paused) >= MAX_PAUSED:
            raise ValueError(f"call {message.id.call} cannot begin: {len(self._paused)} have paused, answer them first")

        leased = self._lent(message, sites)

        def run(ask: Ask) -> m.Message:
            return work(Guests(sites, _Edge(self.executor, sites, message, self.limits, ask), leased))

        self._paused[message.id.call] = PausingCall(run, self.threads)
        return self._advance(message.id.call, None)

    def answer(self, message: m.SiteAnswer) -> m.Message:
        """Go on with a call that has paused.

        Raises:
            LookupError: it has not.
            ValueError: the answer does not fit the question.
        """
        if message.id.call not in self._paused:
            raise LookupError(f"call {message.id.call} has not asked anything")
        return self._advance(message.id.call, message)

    def drop(self, number: int) -> None:
        """End a call, if it has paused: its answer will not come."""
        call = self._paused.pop(number, None)
        if call is not None:
            call.abandon()

    def close(self) -> None:
        """End what has paused, and overwrite what was lent."""
        for number in list(self._paused):
            self.drop(number)
        self._return_lease()

    def _lent(self, message: m.Forward | m.Backward, sites: BoundSites) -> Mapping[int, LeasedWeights]:
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

    def _advance(self, number: int, answer: m.SiteAnswer | None) -> m.Message:
        call = self._paused[number]
        before = call.busy_ns
        try:
            outcome = call.resume(answer)
        except BaseException:
            del self._paused[number]
            raise
        spent = call.busy_ns - before
        if isinstance(outcome, Pause):
            return dataclasses.replace(outcome.question, compute_ns=spent)
        del self._paused[number]
        return dataclasses.replace(outcome, compute_ns=spent) if isinstance(outcome, m.Timed) else outcome


@dataclass(frozen=True, slots=True)
class _Edge:
    """The edge as a visitor: what a site is asked becomes a question on the wire."""

    executor: Executor
    sites: BoundSites
    message: m.Forward | m.Backward
    limits: Limits
    ask: Ask

    def forward(self, sites: Sequence[int], inputs: Sequence[Tensor] | None) -> list[Tensor]:
        """See `isthmus.backbone.site_visit.Visitor`. Sites that share an input share its tensor on the wire."""
        phase = m.SitePhase.AGAIN if inputs is None else m.SitePhase.FORWARD
        answers = self._answers(phase, sites, list({id(x): x.detach() for x in inputs or ()}.values()), Role.ACTIVATION)
        if len(answers) != len(sites):
            raise ValueError(f"{len(answers)} contributions for {len(sites)} sites: one for each is needed")
        for site, answer in zip(sites, answers, strict=True):
            self._check(answer, site, self.executor.host.widths(self.sites.specs[site])[1])
        return answers

    def backward(self, sites: Sequence[int], gradients: Sequence[Tensor], *, wanted: bool) -> list[Tensor | None]:
        """See `isthmus.backbone.site_visit.Visitor`. One gradient may stand for all sites that share an input."""
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
        sent = tuple(encode(tensor, codec, role) for tensor in tensors)
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
        return [decode(each, limits=self.limits).to(dtype, copy=True) for each in answer.tensors]

    def _check(self, answer: Tensor, site: int, width: int) -> None:
        hidden = self._shape()
        if answer.shape != (*hidden[:2], width):
            raise ValueError(
                f"an answer of shape {list(answer.shape)} does not fit site {self.sites.specs[site]}: "
                f"{[*hidden[:2], width]} is needed"
            )

    def _shape(self) -> tuple[int, ...]:
        sent = self.message.hidden if isinstance(self.message, m.Forward) else self.message.gradient
        return torch.Size(sent.shape)
