"""Calls of the cloud's span: what is sent, and what comes back.

A call is a pure function of what is sent and of the answers of its sites, which a `SiteCall` keeps. So a call that
broke in the middle begins anew and ends in the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.split.span import SpanInput
from isthmus.common.errors import RefusedError, RemoteProtocolError
from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest
from isthmus.edge.client.session_keeper import Attempt, Question, SessionKeeper, StashLostError
from isthmus.edge.client.site_visits import SentLists, SiteVisits
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import body_bytes
from isthmus.protocol.session import edge_limits
from isthmus.protocol.tensor_codecs import Role, codec_id, decode_as, encode, encode_mask, encode_positions


@dataclass(slots=True)
class KeptCall:
    """A forward whose backward may come: its number, and the session whose stash knows it."""

    call: int
    session: int = 0


class SpanCalls:
    """A `isthmus.edge.client.remote_span.SpanLink` over a session keeper.

    Attributes:
        codecs: how tensors cross; may be replaced between two calls.
        step: the optimizer step that calls belong to; 0 before the first.
    """

    def __init__(self, keeper: SessionKeeper, codecs: WireCodecs) -> None:
        self.codecs = codecs
        self.step = 0
        self._keeper = keeper
        self._numbers = itertools.count(1)
        self._lists = SentLists()

    def forward(self, request: ForwardRequest) -> tuple[Tensor, KeptCall]:
        """Run the cloud's span."""
        codec, hidden = self.codecs.forward_down, request.inputs.hidden
        sent, visits = self._sent(request.inputs), self._visits(request.sites)
        kept = KeptCall(next(self._numbers))
        # Without sites the input's gradient is all that a backward can want.
        wanted = hidden.requires_grad or request.sites is None

        def message(attempt: Attempt) -> m.Forward:
            kept.session = attempt.session
            sites, lease = (0, 0) if visits is None else self._lists.send(visits.sites, attempt)
            return m.Forward(
                m.CallId(self.step, kept.call, attempt.number),
                request.keep,
                sent.hidden,
                sent.attention_mask,
                sent.position_ids,
                codec_id(codec),
                sites,
                wanted,
                lease,
            )

        most = body_bytes(codec, hidden.shape) if visits is None else visits.forward_bytes(hidden.shape)
        reply = self._keeper.call(Question(m.ForwardReply, message, most, visits))
        if visits is not None:
            visits.take_taps(reply, hidden.shape)
        limits = edge_limits(self._keeper.info)
        return decode_as(reply.hidden, hidden.shape, codec, limits, "the output of the cloud's layers"), kept

    def backward(self, request: BackwardRequest) -> Tensor | None:
        """The gradient of the span's input, None unless it is `wanted`."""
        codec, shape, kept = self.codecs.backward_down, request.inputs.hidden.shape, request.kept
        visits = self._visits(request.sites)
        what = "the gradient for the cloud's layers"
        gradient = encode(request.gradient, self.codecs.backward_up, Role.GRADIENT, what)
        lost = False

        def message(attempt: Attempt) -> m.Backward:
            # A stash lives as long as its session: after a reconnect the input goes along without being asked for.
            replay = self._sent(request.inputs) if lost or kept.session != attempt.session else None
            sites, lease = (0, 0) if visits is None else self._lists.send(visits.sites, attempt)
            call = m.CallId(self.step, kept.call, attempt.number)
            return m.Backward(call, gradient, replay, codec_id(codec), sites, request.wanted, lease)

        most = body_bytes(codec, shape) if request.wanted else 0
        most = most if visits is None else visits.backward_bytes(shape, most)
        question = Question(m.BackwardReply, message, most, visits)
        try:
            reply = self._keeper.call(question)
        except StashLostError:
            lost = True
            self._keeper.traffic.retries += 1
            try:
                reply = self._keeper.call(question)
            except StashLostError:
                raise RemoteProtocolError(
                    "the cloud says that it lost a forward state whose input it was just sent"
                ) from None
        if visits is not None:
            visits.take_back(reply)
        elif reply.leased:
            raise RemoteProtocolError("the cloud answered with gradients of weights, and was lent none")
        if (reply.gradient is None) == request.wanted:
            raise RemoteProtocolError("the cloud answered with a gradient that was not wanted, or with none")
        if reply.gradient is None:
            return None
        limits = edge_limits(self._keeper.info)
        return decode_as(reply.gradient, shape, codec, limits, "the gradient from the cloud's layers")

    def _visits(self, sites: SiteCall | None) -> SiteVisits | None:
        return None if sites is None else SiteVisits(sites, self.codecs, edge_limits(self._keeper.info))

    def _sent(self, inputs: SpanInput) -> m.SpanInputs:
        limit = self._keeper.info.limits.max_tokens_per_call
        if inputs.positions > limit:  # the cloud would cut the stream in the middle of a message that is far too large
            batch, length = inputs.hidden.shape[:2]
            raise RefusedError(
                f"{batch} x {length} tokens in one call; the cloud takes at most {limit}: use smaller batches"
            )
        mask, positions = inputs.attention_mask, inputs.position_ids
        return m.SpanInputs(
            encode(inputs.hidden, self.codecs.forward_up, Role.ACTIVATION, "the hidden states for the cloud's layers"),
            None if mask is None else encode_mask(mask),
            None if positions is None else encode_positions(positions),
        )
