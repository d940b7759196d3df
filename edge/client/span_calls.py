"""Calls of the cloud's span over a link: what is sent, what comes back, and what the cloud asks in between.

A call is a pure function of what is sent and of the answers of its sites, which a `SiteCall` keeps. So a call that
broke in the middle begins anew and ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from isthmus.backbone.sites.leasing import LeasedWeights
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import PlanError, RefusedError, RemoteProtocolError
from isthmus.common.terminal import printable
from isthmus.edge.client.expected_size import backward_bytes, forward_bytes, question_count, tap_widths
from isthmus.edge.client.retry import LastingLink, StashLostError
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Limits
from isthmus.protocol.session import edge_limits
from isthmus.protocol.tensor_codecs import (
    Payload,
    Role,
    codec_by_id,
    codec_id,
    decode,
    encode,
    encode_mask,
    encode_positions,
)
from isthmus.rpc.secure_stream import Channel

R = TypeVar("R", bound=m.Message)


@dataclass(frozen=True, slots=True)
class KeptCall:
    """A forward whose backward may come: its number, and the session whose stash knows it."""

    call: int
    session: int


class Told:
    """What the cloud has been told in this session: lists of sites, of which it forgets the oldest, and a lease."""

    def __init__(self) -> None:
        self._lists: dict[tuple[SiteSpec, ...], int] = {}
        self._session = 0
        self._last = 0
        self._lease: tuple[object, ...] = ()  # whose weights, how often they were changed, and for which list
        self._lease_number = 0

    def tell(self, call: SiteCall, session: int, ask: Callable[[m.Message], m.Message]) -> tuple[int, int]:
        """The numbers of a call's list and of its lease (0 for none), which the cloud is told if it does not know them.

        Raises:
            RefusedError: The cloud has no such site.
        """
        if session != self._session:
            self._lists.clear()
            self._lease = ()
            self._session = session
        if call.specs not in self._lists:
            if len(self._lists) >= m.MAX_LISTS:
                del self._lists[next(iter(self._lists))]
            self._last += 1
            _accepted(ask(m.Sites(self._last, call.specs)))
            self._lists[call.specs] = self._last
        number = self._lists[call.specs]
        if not call.lease:
            return number, 0
        lease = (*call.lease_key, number)
        if lease != self._lease:
            self._lease_number += 1
            _accepted(ask(m.Lease(self._lease_number, number, tuple(map(_packed, call.lease)))))
            self._lease = lease
        return number, self._lease_number


def _accepted(answer: m.Message) -> None:
    if not isinstance(answer, m.Status):
        raise RemoteProtocolError(f"the cloud answered with {type(answer).__name__} where a status was due")
    if answer.code != m.StatusCode.OK:
        raise RefusedError(f"the cloud refused the adapters inside its layers: {printable(answer.message)}")


def _packed(lent: LeasedWeights) -> m.LeasedWeights:
    what = "a matrix lent to the cloud's layers"
    down, up = (encode(matrix.float(), "fp32", Role.ACTIVATION, what) for matrix in (lent.down, lent.up))
    return m.LeasedWeights(down, up, lent.scale)


class SpanCaller(LastingLink):
    """A link that calls the span; see `isthmus.edge.client.remote_span.SpanLink` for the two calls."""

    _calls = 0
    _step = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._told = Told()

    def forward_span(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        keep: bool,
        sites: SiteCall | None = None,
    ) -> tuple[Tensor, KeptCall]:
        """Run the cloud's span."""
        sent = self._inputs(hidden, attention_mask, position_ids)
        with self._lock:
            self._calls += 1
            # Without sites the input's gradient is all that a backward can want.
            call, wanted = self._calls, hidden.requires_grad or sites is None
            reply = self._visiting(
                m.ForwardReply,
                lambda attempt, number, lease: m.Forward(
                    m.CallId(self._step, call, attempt),
                    keep,
                    sent.hidden,
                    sent.attention_mask,
                    sent.position_ids,
                    codec_id(self.codecs.forward_down),
                    number,
                    wanted,
                    lease,
                ),
                sites,
                forward_bytes(self.codecs.forward_down, hidden.shape, sites),
            )
            if sites is not None:
                sites.tapped = self._taps(reply, sites, hidden.shape)
            output = self._result(
                reply.hidden, hidden.shape, self.codecs.forward_down, "the output of the cloud's layers"
            )
            return output, KeptCall(call, self.traffic.sessions)

    def backward_span(
        self,
        kept: KeptCall,
        gradient: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        sites: SiteCall | None = None,
        wanted: bool = True,
    ) -> Tensor | None:
        """The gradient of the span's input, None unless it is `wanted`."""
        sent = encode(gradient, self.codecs.backward_up, Role.GRADIENT, "the gradient for the cloud's layers")
        lost = False

        def question(attempt: int, number: int, lease: int) -> m.Backward:
            # A stash lives as long as its session: after a reconnect the input goes along without being asked for.
            again = lost or kept.session != self.traffic.sessions
            replay = self._inputs(hidden, attention_mask, position_ids) if again else None
            call, reply_codec = m.CallId(self._step, kept.call, attempt), codec_id(self.codecs.backward_down)
            return m.Backward(call, sent, replay, reply_codec, number, wanted, lease)

        most = backward_bytes(self.codecs.backward_down, hidden.shape, sites, wanted=wanted)
        with self._lock:
            try:
                reply = self._visiting(m.BackwardReply, question, sites, most)
            except StashLostError:
                lost = True
                self.traffic.retries += 1
                try:
                    reply = self._visiting(m.BackwardReply, question, sites, most)
                except StashLostError:
                    raise RemoteProtocolError(
                        "the cloud says that it lost a forward state whose input it was just sent"
                    ) from None
            self._take_back(reply, sites)
            if (reply.gradient is None) == wanted:
                raise RemoteProtocolError("the cloud answered with a gradient that was not wanted, or with none")
            if reply.gradient is None:
                return None
            return self._result(
                reply.gradient, hidden.shape, self.codecs.backward_down, "the gradient from the cloud's layers"
            )

    # Below: calls that visit sites ------------------------------------------------------------------------------------

    def _visiting(
        self,
        kind: type[R],
        question: Callable[[int, int, int], m.Message],
        sites: SiteCall | None,
        answer_bytes: int,
    ) -> R:
        """Ask, and answer what the cloud asks about `sites`.

        `question` gets the attempt, and the numbers of the list of sites and of the lease. `answer_bytes`: the most
        that may come back at once.
        """
        numbers = (0, 0)

        def prepare(channel: Channel) -> None:
            nonlocal numbers
            if sites is not None:
                numbers = self._told.tell(
                    sites,
                    self.traffic.sessions,
                    lambda message: channel.ask(message, self._call_timeout, answer_bytes=0),
                )

        visit = None if sites is None else SiteAnswers(sites, self.codecs, edge_limits(self.info))
        return self._call(
            kind,
            lambda attempt: question(attempt, *numbers),
            prepare=prepare,
            visit=visit,
            questions=question_count(sites),
            answer_bytes=answer_bytes,
        )

    def _inputs(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> m.SpanInputs:
        tokens, limit = hidden.shape[0] * hidden.shape[1], self.info.limits.max_tokens_per_call
        if tokens > limit:  # the cloud would cut the stream in the middle of a message that is far too large
            raise RefusedError(
                f"{hidden.shape[0]} x {hidden.shape[1]} tokens in one call; the cloud takes at most {limit}: "
                "use smaller batches"
            )
        return m.SpanInputs(
            encode(hidden, self.codecs.forward_up, Role.ACTIVATION, "the hidden states for the cloud's layers"),
            None if attention_mask is None else encode_mask(attention_mask),
            None if position_ids is None else encode_positions(position_ids),
        )

    def _taps(self, reply: m.ForwardReply, sites: SiteCall, shape: torch.Size) -> tuple[Tensor, ...]:
        """What has come out of the taps."""
        widths = tap_widths(sites, shape[-1])
        if len(reply.taps) != len(widths):
            raise RemoteProtocolError(f"the cloud answered with {len(reply.taps)} taps instead of {len(widths)}")
        return tuple(
            self._result(payload, torch.Size((*shape[:2], width)), self.codecs.forward_down, f"the output of tap {tap}")
            for tap, (payload, width) in enumerate(zip(reply.taps, widths, strict=True))
        )

    def _take_back(self, reply: m.BackwardReply, sites: SiteCall | None) -> None:
        """Hand on the gradients of what was lent."""
        limits = edge_limits(self.info)
        for payload in reply.leased:
            _check_codec(payload, "fp32")
        lent = [
            decode(payload, limits=limits, what="the gradient of a lent matrix").clone() for payload in reply.leased
        ]
        try:
            if sites is not None:
                sites.take_gradients(lent)
        except PlanError as error:
            raise RemoteProtocolError(f"the cloud answered with other gradients than were lent: {error}") from None

    def _result(self, payload: Payload, expected: torch.Size, codec: str, what: str) -> Tensor:
        if payload.shape != tuple(expected):
            raise RemoteProtocolError(
                f"the cloud answered with shape {list(payload.shape)} instead of {list(expected)}"
            )
        _check_codec(payload, codec)
        return decode(payload, limits=edge_limits(self.info), what=what)


@dataclass(frozen=True, slots=True)
class SiteAnswers:
    """Answers the cloud's questions about sites, by asking a `SiteCall`."""

    sites: SiteCall
    codecs: WireCodecs
    limits: Limits

    def __call__(self, question: m.SiteQuestion) -> m.SiteAnswer:
        """The answer.

        Raises:
            RemoteProtocolError: The cloud asks about what is not there.
        """
        backward = question.phase in (m.SitePhase.BACKWARD, m.SitePhase.BACKWARD_ONLY)
        for payload in question.tensors:
            _check_codec(payload, self.codecs.backward_down if backward else self.codecs.forward_down)
        # Copies: a received tensor is a view of its message, and what a site keeps lives longer.
        specs = self.sites.specs
        named = ", ".join(str(specs[site]) for site in question.sites if site < len(specs))
        what = f"the {'gradient' if backward else 'input'} of sites {named}"
        tensors = [decode(payload, limits=self.limits, what=what).clone() for payload in question.tensors]
        try:
            answers, codec, role = self._answers(question, tensors)
        except PlanError as error:
            raise RemoteProtocolError(f"the cloud asks what it cannot: {error}") from None
        return m.SiteAnswer(question.id, tuple(encode(answer, codec, role) for answer in answers))

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


def _check_codec(payload: Payload, codec: str) -> None:
    """Another codec than the one asked for would be coarser without a word, or larger once it is decoded."""
    if payload.codec != codec_id(codec):
        raise RemoteProtocolError(
            f"the cloud answered in the codec {codec_by_id(payload.codec).name} instead of {codec}"
        )
