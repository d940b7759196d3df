"""Adapters inside the cloud's layers, during one call: what the cloud is sent, what it may ask, and the answers.

How large an answer may be is bounded: what was asked for, in the codec that it was asked in, and no more. The session
refuses anything larger at its first frame, before it allocates (`EdgeSession.expect`). A question about sites stands in
the place of a reply. It is about sites that read one input, all of one layer; which of a layer's sites share an input
is the cloud's to know, so the bound is what all sites of a layer together would take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import PlanError, RefusedError, RemoteProtocolError
from isthmus.common.terminal import printable
from isthmus.edge.client.questions import Asked, Attempt
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import body_bytes
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Role, check_codec, decode, decode_as, encode

QUESTIONS_PER_SITE = 2
"""A backward may ask about a site twice: for its contribution once more, where the forward has to be computed again,
and for the input's gradient."""

_FORWARDS = (m.SitePhase.FORWARD, m.SitePhase.AGAIN)
_BACKWARDS = (m.SitePhase.BACKWARD, m.SitePhase.BACKWARD_ONLY)


class SentLists:
    """What the cloud was sent in the present session: lists of sites, of which it forgets the oldest, and a lease."""

    def __init__(self) -> None:
        self._lists: dict[tuple[SiteSpec, ...], int] = {}
        self._session = 0
        self._last = 0
        self._lease: tuple[object, ...] = ()  # whose weights, how often they were changed, and for which list
        self._lease_number = 0

    def send(self, sites: SiteCall, attempt: Attempt) -> tuple[int, int]:
        """The numbers of a call's list and of its lease (0 for none), which the cloud is sent if it does not know them.

        Raises:
            RefusedError: The cloud has no such site.
        """
        if attempt.session != self._session:
            self._lists.clear()
            self._lease = ()
            self._session = attempt.session
        if sites.specs not in self._lists:
            if len(self._lists) >= m.MAX_LISTS:
                del self._lists[next(iter(self._lists))]
            self._last += 1
            accepted(attempt.ask(m.Sites(self._last, sites.specs)))
            self._lists[sites.specs] = self._last
        number = self._lists[sites.specs]
        if not sites.lease:
            return number, 0
        lease = (*sites.lease_key, number)
        if lease != self._lease:
            self._lease_number += 1
            accepted(attempt.ask(m.Lease(self._lease_number, number, tuple(map(_packed, sites.lease)))))
            self._lease = lease
        return number, self._lease_number


def accepted(answer: m.Message) -> None:
    """Make sure that the cloud has taken sites or a lease. Raises RefusedError where it has not."""
    if not isinstance(answer, m.Status):
        raise RemoteProtocolError(f"the cloud answered with {type(answer).__name__} where a status was due")
    if answer.code != m.StatusCode.OK:
        raise RefusedError(f"the cloud refused the adapters inside its layers: {printable(answer.message)}")


def _packed(lora: LeasedLora) -> m.LeasedWeights:
    what = "a matrix leased to the cloud's layers"
    down, up = (encode(matrix.float(), "fp32", Role.ACTIVATION, what) for matrix in (lora.down, lora.up))
    return m.LeasedWeights(down, up, lora.scale)


@dataclass(frozen=True, slots=True)
class SiteAnswerer:
    """Answers for one call's sites; an `isthmus.edge.client.session_keeper.Answerer`.

    Args:
        sites: what answers for them.
        codecs: how tensors cross.
        limits: what the edge accepts.
    """

    sites: SiteCall
    codecs: WireCodecs
    limits: Limits

    @property
    def questions(self) -> int:
        """Most questions about sites in the call."""
        return QUESTIONS_PER_SITE * sum(site.spec.asks for site in self.sites.sites)

    def forward_bytes(self, shape: torch.Size) -> int:
        """Most bytes of what comes back in a forward of hidden states of `shape`: the reply, or inputs of sites."""
        codec = self.codecs.forward_down
        reply = body_bytes(codec, shape) + sum(body_bytes(codec, tap) for tap in self._tap_shapes(shape))
        return max(reply, self._question_bytes(codec, shape, given=0))

    def backward_bytes(self, shape: torch.Size, reply_bytes: int) -> int:
        """Most bytes of what comes back in a backward: `reply_bytes` and what belongs to leases, or to sites."""
        leased = sum(body_bytes("fp32", matrix.shape) for matrix in self.sites.leased_parameters)
        return max(reply_bytes + leased, self._question_bytes(self.codecs.backward_down, shape, given=1))

    def take_taps(self, reply: m.ForwardReply, shape: torch.Size) -> None:
        """Hand on what has come out of the taps in a forward of hidden states of `shape`."""
        shapes = self._tap_shapes(shape)
        if len(reply.taps) != len(shapes):
            raise RemoteProtocolError(f"the cloud answered with {len(reply.taps)} taps instead of {len(shapes)}")
        self.sites.tapped = tuple(
            decode_as(payload, expected, self.codecs.forward_down, self.limits, f"the output of tap {tap}")
            for tap, (payload, expected) in enumerate(zip(reply.taps, shapes, strict=True))
        )

    def take_back(self, reply: m.BackwardReply) -> None:
        """Hand on the gradients of leased weights."""
        for payload in reply.leased:
            check_codec(payload, "fp32")
        what = "the gradient of a leased matrix"
        try:
            self.sites.take_gradients(
                [decode(payload, limits=self.limits, what=what).clone() for payload in reply.leased]
            )
        except PlanError as error:
            raise RemoteProtocolError(
                f"the cloud answered with other gradients than those of the leased weights: {error}"
            ) from None

    def answer(self, question: m.SiteQuestion) -> m.SiteAnswer:
        """Answer what the cloud asks in the middle of the call.

        Raises:
            RemoteProtocolError: The cloud asks about what is not there.
        """
        backward = question.phase in _BACKWARDS
        for payload in question.tensors:
            check_codec(payload, self.codecs.backward_down if backward else self.codecs.forward_down)
        specs = self.sites.specs
        named = ", ".join(str(specs[site]) for site in question.sites if site < len(specs))
        what = f"the {'gradient' if backward else 'input'} of sites {named}"
        # Copies: a received tensor is a view of its message, and what a site keeps lives longer.
        tensors = [decode(payload, limits=self.limits, what=what).clone() for payload in question.tensors]
        try:
            answers, codec, role = self._answers(question, tensors)
        except PlanError as error:
            raise RemoteProtocolError(f"the cloud asks what it cannot: {error}") from None
        return m.SiteAnswer(question.id, tuple(encode(answer, codec, role) for answer in answers))

    def check_asked(self, reply: m.ForwardReply | m.BackwardReply, asked: Sequence[Asked]) -> None:
        """Make sure that every site which the edge runs was asked about: a cloud may not leave an adapter out.

        Raises:
            RemoteProtocolError: It has.
        """
        phases = _FORWARDS if isinstance(reply, m.ForwardReply) else _BACKWARDS
        known = {site for each in asked if each.phase in phases for site in each.sites}
        left_out = [site for number, site in enumerate(self.sites.sites) if site.spec.asks and number not in known]
        if left_out:
            raise RemoteProtocolError(
                f"the cloud has answered a call without asking for the adapter at {left_out[0].spec}: it computes "
                "another model than the one that is trained"
            )

    def _answers(self, question: m.SiteQuestion, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], str, Role]:
        if question.phase in (m.SitePhase.FORWARD, m.SitePhase.AGAIN):
            inputs = None if question.phase == m.SitePhase.AGAIN else self._inputs(question.sites, tensors)
            return self.sites.forward(question.sites, inputs), self.codecs.forward_up, Role.ACTIVATION
        wanted = question.phase == m.SitePhase.BACKWARD
        answers = self.sites.backward(question.sites, tensors, wanted=wanted)
        return [each for each in answers if each is not None], self.codecs.backward_up, Role.GRADIENT

    def _inputs(self, sites: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
        """One input for each site: those that are placed on the edge share the first one that is theirs.

        Raises:
            RemoteProtocolError: There are more tensors, or fewer, than that makes.
        """
        specs = self.sites.specs
        own = [site < len(specs) and specs[site].placement != Placement.EDGE for site in sites]
        if len(tensors) != sum(own) + (not all(own)):
            raise RemoteProtocolError(f"the cloud asks about {len(sites)} sites with {len(tensors)} tensors")
        left = list(tensors)
        shared = None if all(own) else left.pop(own[: own.index(False)].count(True))
        return [left.pop(0) if is_own or shared is None else shared for is_own in own]

    def _tap_shapes(self, shape: torch.Size) -> list[torch.Size]:
        """The shapes of what comes out of each tap, by that of the hidden states."""
        taps = (spec for spec in self.sites.specs if spec.placement == Placement.TAP)
        return [torch.Size((*shape[:2], tap.rank or shape[-1])) for tap in taps]

    def _question_bytes(self, codec: str, shape: torch.Size, given: int) -> int:
        """`given`: 0 where a site is given its input, 1 where it is given the gradient of what it adds."""
        layers: Counter[int] = Counter()
        for site in self.sites.sites:
            if site.spec.asks:
                layers[site.layer] += body_bytes(codec, (*shape[:2], site.widths[given]))
        return max(layers.values(), default=0)
