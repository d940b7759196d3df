"""What the cloud says in a call of the span: replies, and questions about the edge's adapters inside its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from fuzz.target import Cursor, Target, block
from fuzz.targets.messages import LIMITS, canonical, filled
from support.protocol.wire import TENANT, session_info
from torch import Tensor, nn

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.low_rank import LowRankSite
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.backbone.split.span import SpanInput
from isthmus.common.errors import ConnectionLostError, NonFiniteError, RefusedError, RemoteProtocolError
from isthmus.edge.client.questions import ActivationsLostError, Attempt, Question, refusal
from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest, SpanCalls
from isthmus.edge.client.site_answerer import SiteAnswerer
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.tensor_codecs import Payload, Role, decode_as, encode
from isthmus.rpc.secure_stream import Traffic

WIDTH, SHAPE = 4, (1, 2, 4)


class _Script:
    """In the place of a session keeper: the cloud is a script. It asks once and does not repeat."""

    def __init__(self, script: Cursor) -> None:
        self.traffic = Traffic()
        self.info = session_info(TENANT, bytes(16))
        self._script = script

    def call(self, question: Question[Any]) -> Any:
        accepted = m.Status(m.StatusCode.OK, None, "")
        pack(question.message(Attempt(0, 1, lambda message: accepted)))
        answer = self._next()
        while question.answerer is not None and isinstance(answer, m.SiteQuestion):
            pack(question.answerer.answer(answer))
            answer = self._next()
        if isinstance(answer, m.Status):
            raise refusal(answer)
        if not isinstance(answer, question.kind):
            raise RemoteProtocolError("the link refuses an answer of another kind")
        return answer

    def _next(self) -> m.Message:
        if not self._script:
            raise ConnectionLostError("the script is at its end")
        return unpack(header := canonical(self._script.block()), filled(header, self._script.block()), LIMITS)


def _run(data: bytes) -> None:
    script = Cursor(data)
    flags = script.number()
    keeper: Any = _Script(script)
    edge = SpanCalls(keeper, WireCodecs.parse("bf16"))
    inputs = SpanInput(torch.ones(SHAPE, requires_grad=True), torch.ones(SHAPE[:2]))
    call = _sites(bool(flags & 4)) if flags & 1 else None
    expected = RemoteProtocolError, RefusedError, ConnectionLostError, NonFiniteError, ActivationsLostError
    with contextlib.suppress(*expected):
        output, kept = edge.forward(ForwardRequest(inputs, True, call))
        _check(output)
        wanted = not flags & 2
        back = edge.backward(BackwardRequest(kept, torch.ones(SHAPE), inputs, call, wanted))
        if wanted:
            _check(back)


def _check(result: Tensor | None) -> None:
    if result is None or tuple(result.shape) != SHAPE or result.dtype != torch.float32:
        raise AssertionError(f"the cloud's reply became {result}")


def _sites(summed: bool) -> SiteCall:
    torch.manual_seed(0)
    sites = [Site(name, SiteSpec(1, name), nn.Linear(WIDTH, 6, bias=False)) for name in ("q", "v")]
    sites.append(Site("up", SiteSpec(1, "up", Placement.LOW_RANK, 2, 1), LowRankSite(2, 1.0)))
    return SiteCall(sites, keep=True, taps=[SiteSpec(1, "", Placement.TAP, 3, 1)], summed=summed)


def _tensor(*shape: int, role: Role = Role.ACTIVATION) -> Payload:
    return encode(torch.ones(shape), "bf16", role)


def _script(flags: int, *messages: m.Message) -> bytes:
    parts = [bytes((flags,))]
    for message in messages:
        header, body = pack(message)
        parts += block(header), block(b"".join(body))
    return b"".join(parts)


def _seeds() -> Iterator[bytes]:
    name = m.CallId(0, 1)
    reply, gradient = m.ForwardReply(name, _tensor(*SHAPE), 1, 2, 3), _tensor(*SHAPE, role=Role.GRADIENT)
    back = m.BackwardReply(name, gradient, 1, 2, 3, False)
    yield _script(0, reply, back)
    yield _script(2, reply, m.BackwardReply(name, None, 1, 2, 3, True))
    yield _script(0, m.ForwardReply(name, _tensor(1, 2, 5), 1, 2, 3))
    yield _script(0, reply, m.Status(m.StatusCode.ACTIVATIONS_LOST, name, ""), back)
    for code in m.StatusCode:
        yield _script(0, m.Status(code, name, "no"))
    tapped = m.ForwardReply(name, _tensor(*SHAPE), 1, 2, 3, (_tensor(1, 2, 3),))
    asks = m.SiteQuestion(name, m.SitePhase.FORWARD, (0, 1, 2), (_tensor(*SHAPE), _tensor(1, 2, 2)), 1, 2, 3)
    again = m.SiteQuestion(name, m.SitePhase.AGAIN, (0, 1), (), 1, 2, 3)
    outs = (_tensor(1, 2, 6, role=Role.GRADIENT), _tensor(1, 2, 6, role=Role.GRADIENT))
    backwards = m.SiteQuestion(name, m.SitePhase.BACKWARD, (0, 1), outs, 1, 2, 3)
    last = m.SiteQuestion(name, m.SitePhase.BACKWARD_ONLY, (2,), (_tensor(1, 2, 2, role=Role.GRADIENT),), 1, 2, 3)
    for flags in (1, 5):
        yield _script(flags, asks, again, tapped, backwards, last, back)
    yield _script(1, m.SiteQuestion(name, m.SitePhase.FORWARD, (0,), (_tensor(1, 2, 5),), 1, 2, 3))
    yield _script(1, m.SiteQuestion(name, m.SitePhase.FORWARD, (9,), (_tensor(*SHAPE),), 1, 2, 3))
    yield _script(1, asks, reply)
    gradients = tuple(encode(torch.ones(shape), "fp32", Role.GRADIENT) for shape in ((2, 3), (4, 2)))
    yield _script(1, asks, tapped, m.BackwardReply(name, gradient, 1, 2, 3, False, gradients))


TARGET = Target(
    _run,
    _seeds,
    [
        SpanCalls.forward,
        SpanCalls.backward,
        SiteAnswerer,
        SiteCall,
        decode_as,
        refusal,
    ],
    floor=0.88,
    max_len=2048,
)
