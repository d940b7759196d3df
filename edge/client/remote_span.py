"""The cloud's layers as one differentiable function of hidden states and of the adapters inside them.

The backbone is frozen, so what can want a gradient is the input and the parameters of the sites. The input is kept on
the edge until the backward has been answered: whatever happens to the cloud's activation cache or to the connection,
the call can be repeated and gives the same bits (Petals keeps inputs for the same reason, Borzunov et al., 2023).

    RemoteSpan       what the model calls; an autograd function makes two requests of it
    SpanCalls        sends the requests as messages, and checks what comes back
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.leasing import leased
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.backbone.split.span import SpanInput
from isthmus.backbone.split.split_cache import RemoteCache
from isthmus.common.errors import RefusedError, RemoteProtocolError, UnsupportedCallError
from isthmus.edge.client.cloud_cache import CloudCaches
from isthmus.edge.client.questions import ActivationsLostError, Attempt, Question
from isthmus.edge.client.session_keeper import SessionKeeper
from isthmus.edge.client.site_answerer import SentLists, SiteAnswerer, accepted
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import body_bytes, pack
from isthmus.protocol.session import edge_limits
from isthmus.protocol.tensor_codecs import Role, codec_id, decode_as, encode, encode_mask, encode_positions


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """One forward of the span.

    Attributes:
        inputs: hidden states, mask and positions.
        keep: whether a backward may follow.
        sites: the adapters inside the span that act; None for none.
        plan: of a package that the cloud offers, whose middle is run in the span's place; None for the span.
    """

    inputs: SpanInput
    keep: bool
    sites: SiteCall | None = None
    plan: str | None = None


@dataclass(frozen=True, slots=True)
class BackwardRequest:
    """The backward of one forward.

    Attributes:
        kept: what the forward gave for it.
        gradient: of the span's output, `[B, S, h]`.
        inputs: those of the forward, in case the cloud has forgotten them.
        sites: those of the forward.
        wanted: whether the gradient of the input is.
    """

    kept: Any
    gradient: Tensor
    inputs: SpanInput
    sites: SiteCall | None = None
    wanted: bool = True


class SpanLink(Protocol):
    """What the remote span needs of a link."""

    def forward(self, request: ForwardRequest) -> tuple[Tensor, Any]:
        """Run the span, and the sites inside it; returns its output and what its backward is to be asked with."""

    def backward(self, request: BackwardRequest) -> Tensor | None:
        """Gradient of the span's input, None unless it is `wanted`; the sites find out their own."""

    def new_cache(self) -> RemoteCache:
        """An empty cache of the cloud's layers."""


class RemoteSpan:
    """Calls the cloud's span: `(hidden, attention_mask, position_ids) -> hidden`.

    Deliberately not an `nn.Module`: it owns no weights, and a link has no place in a state dict or a copy of the model.

    Args:
        link: What is called.
        leased: Whether the weights of the site of that name may be leased to the cloud, which then runs its adapter.
        summed: Whether the sites that share an input answer a backward with one gradient of it, the sum of theirs. That
            saves traffic, and adds up in another order than a single process does.

    Attributes:
        notice: called with the sites whenever some act, and when adapters have just been put on the model; may be
            replaced.
    """

    def __init__(
        self, link: SpanLink, *, leased: Callable[[str], bool] = lambda name: False, summed: bool = False
    ) -> None:
        self.notice: Callable[[Sequence[Site]], None] = lambda sites: None
        self._link = link
        self._leased = leased
        self._summed = summed

    def __call__(self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Hidden states [batch, sequence, hidden size] after the span; same dtype and device as the input."""
        return self._run(hidden, attention_mask, position_ids, ())

    def at_sites(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site]
    ) -> Tensor:
        """The same, with adapters inside the span; see `isthmus.backbone.split.edge_model.SitedSpan`.

        Raises:
            UnsupportedCallError: A site that is to be leased cannot be.
        """
        placed = self.placed(sites)
        self.notice(placed)
        return self._run(hidden, attention_mask, position_ids, placed)

    def placed(self, sites: Sequence[Site]) -> list[Site]:
        """The same sites, those leased that are to be.

        Raises:
            UnsupportedCallError: One cannot be.
        """
        return [leased(site) if not site.spec.is_leased and self._leased(site.name) else site for site in sites]

    def expect_sites(self, sites: Sequence[Site]) -> None:
        """Adapters have been put on the cloud's layers; see `isthmus.backbone.split.edge_model.SitedSpan`."""
        self.notice([site for site in sites if not self._leased(site.name)])

    def new_cache(self) -> RemoteCache:
        """An empty cache of the cloud's layers; see `isthmus.backbone.split.edge_model.CachingSpan`."""
        return self._link.new_cache()

    def tapped(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, taps: Sequence[SiteSpec]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The span's output and what comes out of `taps` inside it; see `TappedSpan` of the split model.

        No gradient flows through the span.
        """
        call = SiteCall((), keep=False, taps=taps)
        inputs = SpanInput(hidden.detach(), attention_mask, position_ids)
        with torch.no_grad():
            output, _ = self._link.forward(ForwardRequest(inputs, keep=False, sites=call))
        return _like(output, hidden), tuple(_like(each, hidden) for each in call.tapped)

    def _run(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site]
    ) -> Tensor:
        # Nothing trainable below or inside the span, or no gradients wanted: no backward will come, and the cloud need
        # not keep anything for it.
        trainable = hidden.requires_grad or any(site.parameters for site in sites)
        keep = torch.is_grad_enabled() and trainable
        call = SiteCall(sites, keep=keep, summed=self._summed) if sites else None
        # The sites' parameters are inputs too: else a model whose only adapters are inside would get no backward.
        parameters = () if call is None else call.parameters
        output: Tensor = _SpanFunction.apply(  # type: ignore[no-untyped-call]  # torch
            hidden, attention_mask, position_ids, self._link, keep, call, *parameters
        )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSpan:
        """A copied model talks over the same link."""
        return self


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    return tensor.to(device=model.device, dtype=model.dtype)


class _SpanFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        link: SpanLink,
        keep: bool,
        sites: SiteCall | None,
        *_parameters: Tensor,
    ) -> Tensor:
        output, kept = link.forward(ForwardRequest(SpanInput(hidden, mask, positions), keep, sites))
        if keep:
            ctx.save_for_backward(hidden, mask, positions)
            ctx.link, ctx.kept, ctx.sites = link, kept, sites
        elif sites is not None:
            sites.close()
        return _like(output, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = SpanInput(*ctx.saved_tensors)
        sites: SiteCall | None = ctx.sites
        if sites is not None and sites.closed:
            raise UnsupportedCallError(
                "a backward through adapters inside the cloud's layers runs once: run the forward again for another one"
            )
        wanted = ctx.needs_input_grad[0]
        result = ctx.link.backward(BackwardRequest(ctx.kept, gradient, inputs, sites, wanted))
        if result is not None:
            result = _like(result, inputs.hidden)
        gradients: list[Tensor | None] = []
        if sites is not None:
            gradients = sites.gradients()
            sites.close()
        return result, None, None, None, None, None, *gradients


@dataclass(slots=True)
class KeptCall:
    """A forward whose backward may come: its number, and the session whose activation cache has it."""

    call: int
    session: int = 0


class SpanCalls:
    """A `SpanLink` over a session keeper.

    A call is a pure function of what is sent and of the answers of its sites, which a `SiteCall` keeps. So a call that
    broke in the middle begins anew and ends in the same bits.

    Attributes:
        codecs: how tensors cross; may be replaced between two calls.
        step: the optimizer step that calls belong to; 0 before the first.
        caches: the caches in the cloud.
    """

    def __init__(self, keeper: SessionKeeper, codecs: WireCodecs) -> None:
        self.codecs = codecs
        self.step = 0
        self._keeper = keeper
        self._numbers = itertools.count(1)
        self._lists = SentLists()
        self.caches = CloudCaches(keeper, lambda: self.codecs, self._numbers, self._lists)

    def new_cache(self) -> RemoteCache:
        """An empty cache of the cloud's layers."""
        return self.caches.new()

    def forward(self, request: ForwardRequest) -> tuple[Tensor, KeptCall]:
        """Run the cloud's span."""
        codec, hidden = self.codecs.forward_down, request.inputs.hidden
        sent, answerer = self._sent(request.inputs), self._answerer(request.sites)
        kept = KeptCall(next(self._numbers))
        # Without sites the input's gradient is all that a backward can want.
        wanted = hidden.requires_grad or request.sites is None

        def message(attempt: Attempt) -> m.Forward:
            kept.session = attempt.session
            sites, lease = (0, 0) if answerer is None else self._lists.send(answerer.sites, attempt)
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
                request.plan,
            )

        most = body_bytes(codec, hidden.shape) if answerer is None else answerer.forward_bytes(hidden.shape)
        reply = self._keeper.call(Question(m.ForwardReply, message, most, answerer))
        if answerer is not None:
            answerer.take_taps(reply, hidden.shape)
        limits, what = edge_limits(self._keeper.info), "the output of the cloud's layers"
        return decode_as(reply.hidden, hidden.shape, codec, limits, what, hidden.device), kept

    def backward(self, request: BackwardRequest) -> Tensor | None:
        """The gradient of the span's input, None unless it is `wanted`."""
        codec, shape, kept = self.codecs.backward_down, request.inputs.hidden.shape, request.kept
        answerer = self._answerer(request.sites)
        what = "the gradient for the cloud's layers"
        gradient = encode(request.gradient, self.codecs.backward_up, Role.GRADIENT, what)
        lost = False

        def message(attempt: Attempt) -> m.Backward:
            # The activations live as long as their session: after a reconnect the input goes along unasked.
            replay = self._sent(request.inputs) if lost or kept.session != attempt.session else None
            sites, lease = (0, 0) if answerer is None else self._lists.send(answerer.sites, attempt)
            call = m.CallId(self.step, kept.call, attempt.number)
            return m.Backward(call, gradient, replay, codec_id(codec), sites, request.wanted, lease)

        most = body_bytes(codec, shape) if request.wanted else 0
        most = most if answerer is None else answerer.backward_bytes(shape, most)

        def whole(asked: m.Message) -> m.Message:
            if not isinstance(asked, m.Backward) or asked.replay is not None:
                return asked
            return replace(asked, replay=self._sent(request.inputs))

        question = Question(m.BackwardReply, message, most, answerer, whole=whole)
        try:
            reply = self._keeper.call(question)
        except ActivationsLostError:
            lost = True
            self._keeper.traffic.retries += 1
            try:
                reply = self._keeper.call(question)
            except ActivationsLostError:
                raise RemoteProtocolError(
                    "the cloud says that it lost a forward state whose input it was just sent"
                ) from None
        if answerer is not None:
            answerer.take_back(reply)
        elif reply.leased:
            raise RemoteProtocolError("the cloud answered with gradients of leased weights, and none are leased")
        if (reply.gradient is None) == request.wanted:
            raise RemoteProtocolError("the cloud answered with a gradient that was not wanted, or with none")
        if reply.gradient is None:
            return None
        limits = edge_limits(self._keeper.info)
        what = "the gradient from the cloud's layers"
        return decode_as(reply.gradient, shape, codec, limits, what, request.gradient.device)

    def again(
        self, adapters: Sequence[m.Sites | m.Lease], call: m.Forward | m.Backward, answer: m.Message
    ) -> m.Message:
        """Ask a call once more that was asked before, perhaps of another cloud; what comes back is not decoded.

        Args:
            adapters: The list of sites and the lease that it names, which are sent before it.
            call: What was asked; a backward has its forward's inputs with it.
            answer: What came back then: no more bytes may come now.
        """
        number = next(self._numbers)

        def message(attempt: Attempt) -> m.Message:
            for each in adapters:
                accepted(attempt.ask(each))
            named = m.CallId(call.id.step, number, attempt.number)
            return replace(call, id=named, keep=False) if isinstance(call, m.Forward) else replace(call, id=named)

        most = sum(map(len, pack(answer)[1]))
        question: Question[m.ForwardReply | m.BackwardReply] = Question(
            (m.ForwardReply, m.BackwardReply), message, most
        )
        return self._keeper.call(question)

    def _answerer(self, sites: SiteCall | None) -> SiteAnswerer | None:
        return None if sites is None else SiteAnswerer(sites, self.codecs, edge_limits(self._keeper.info))

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
