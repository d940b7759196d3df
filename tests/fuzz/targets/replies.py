"""What the cloud says in a call of the span: replies, and questions about the edge's adapters inside its layers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fuzz.target import Cursor, Target, block
from fuzz.targets.messages import LIMITS, canonical, filled
from support.wire import TENANT, session_info
from torch import Tensor, nn

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.low_rank import LowRankSite
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import ConnectionLostError, NonFiniteError, RefusedError, RemoteProtocolError
from isthmus.edge.client.retry import StashLostError, _error
from isthmus.edge.client.span_calls import KeptCall, SiteAnswers, SpanCaller
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.tensor_codecs import Payload, Role, encode
from isthmus.rpc.secure_stream import Traffic

WIDTH, SHAPE = 4, (1, 2, 4)


class _Edge(SpanCaller):
    """A caller whose cloud is a script. It asks once and does not repeat."""

    def __init__(self, script: Cursor) -> None:
        self.traffic, self.codecs, self._lock = Traffic(), WireCodecs.parse("bf16"), threading.RLock()
        self._info = session_info(TENANT, bytes(16))
        self._call_timeout = 1.0
        self._script = script

    def _call(
        self,
        kind: type[Any],
        question: Callable[[int], m.Message],
        *,
        prepare: Any = None,
        visit: Callable[[m.SiteQuestion], m.SiteAnswer] | None = None,
        questions: int = 0,
        answer_bytes: int = 0,
        patience: float | None = None,
        timeout: float | None = None,
    ) -> Any:
        asked = question(0)
        pack(asked)
        answer = self._next()
        while visit is not None and isinstance(answer, m.SiteQuestion):
            pack(visit(answer))
            answer = self._next()
        if isinstance(answer, m.Status):
            raise _error(answer)
        if not isinstance(answer, kind):
            raise RemoteProtocolError("the link refuses an answer of another kind")
        return answer

    def _next(self) -> m.Message:
        if not self._script:
            raise ConnectionLostError("the script is at its end")
        return unpack(header := canonical(self._script.block()), filled(header, self._script.block()), LIMITS)


def _run(data: bytes) -> None:
    script = Cursor(data)
    flags = script.number()
    edge = _Edge(script)
    hidden, mask = torch.ones(SHAPE, requires_grad=True), torch.ones(SHAPE[:2])
    call = _sites(bool(flags & 4)) if flags & 1 else None
    with contextlib.suppress(RemoteProtocolError, RefusedError, ConnectionLostError, NonFiniteError, StashLostError):
        output, _ = edge.forward_span(hidden, mask, None, keep=True, sites=call)
        _check(output)
        wanted = not flags & 2
        back = edge.backward_span(KeptCall(1, 0), torch.ones(SHAPE), hidden, mask, None, sites=call, wanted=wanted)
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
    lent = tuple(encode(torch.ones(shape), "fp32", Role.GRADIENT) for shape in ((2, 3), (4, 2)))
    yield _script(1, asks, tapped, m.BackwardReply(name, gradient, 1, 2, 3, False, lent))


TARGET = Target(
    _run,
    _seeds,
    [
        SpanCaller._taps,
        SpanCaller._take_back,
        SpanCaller._result,
        SpanCaller.forward_span,
        SpanCaller.backward_span,
        SiteAnswers,
        SiteCall,
        _error,
    ],
    floor=0.88,
    max_len=2048,
)
