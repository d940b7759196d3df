"""Calls: any messages of an edge, in any order, to a session over a real span: what is decoded behind the protocol."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from fuzz.target import Cursor, Target, block, scratch
from fuzz.targets.messages import LIMITS, canonical, filled
from support.cloud.clouds import served
from support.models.tiny import HIDDEN, tiny_checkpoint
from support.protocol.wire import TENANT

from isthmus.backbone.plan import Span
from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.edge_adapters import EdgeAdapters
from isthmus.cloud.session.handler import OfferedPackage, TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.site_calls import SiteCalls
from isthmus.cloud.session.site_lists import SiteLists
from isthmus.common.errors import RemoteProtocolError
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.tensor_codecs import Payload, Role, codec_id, encode, encode_mask, encode_positions

CACHE_BYTES = 1 << 16
_MESSAGES = 8


@functools.cache
def _cloud() -> Served:
    torch.set_num_threads(1)
    folder = scratch()
    cloud = served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=32, stash_bytes=CACHE_BYTES)
    offered = {name: OfferedPackage(cloud.parts, name) for name in "ab"}
    return replace(cloud, packages=offered, middles={"2:3": cloud.executor.host.span.part(Span(2, 3))})


@functools.cache
def _threads() -> CallThreads:
    return CallThreads(1, 16)


def _run(data: bytes) -> None:
    script, cloud = Cursor(data), _cloud()
    session = cloud.session(b"s" * 16, TENANT, _threads(), LIMITS)
    try:
        for _ in range(_MESSAGES):
            if not script:
                break
            header, body = canonical(script.block()), script.block()
            with contextlib.suppress(RemoteProtocolError):
                message = unpack(header, filled(header, body), LIMITS)
                if isinstance(message, m.EDGE_SENDS) and not isinstance(message, m.Put | m.PlugIn):
                    _check(message, session.handle(message))
            if cloud.executor.cache.used > CACHE_BYTES:
                raise AssertionError(f"the activation cache holds {cloud.executor.cache.used} bytes")
    finally:
        session.close()
    if cloud.executor.cache.used:
        raise AssertionError(f"a closed session leaves {cloud.executor.cache.used} bytes behind")


def _check(message: m.Message, answer: m.Message | None) -> None:
    if isinstance(answer, m.Status) and answer.code == m.StatusCode.INTERNAL:
        raise AssertionError(f"the span failed at a {type(message).__name__}: {answer.message}")
    if answer is not None:
        pack(answer)


def _tensor(*shape: int, codec: str = "int4", role: Role = Role.ACTIVATION) -> Payload:
    return encode(torch.randn(shape, generator=torch.Generator().manual_seed(1)), codec, role)


def _forward(
    call: int, *, keep: bool = True, sites: int = 0, lease: int = 0, shape: tuple[int, ...] = (1, 2, HIDDEN)
) -> m.Forward:
    return m.Forward(m.CallId(1, call), keep, _tensor(*shape), None, None, codec_id("int8"), sites, True, lease)


def _backward(call: int, *, sites: int = 0, lease: int = 0, replay: m.SpanInputs | None = None) -> m.Backward:
    gradient = _tensor(1, 2, HIDDEN, role=Role.GRADIENT)
    return m.Backward(m.CallId(1, call), gradient, replay, codec_id("int8"), sites, True, lease)


def _script(*messages: m.Message) -> bytes:
    parts = []
    for message in messages:
        header, body = pack(message)
        parts += block(header), block(b"".join(body))
    return b"".join(parts)


def _seeds() -> Iterator[bytes]:
    mask, positions = encode_mask(torch.tensor([[0, 1]])), encode_positions(torch.tensor([[0, 1]]))
    inputs = m.SpanInputs(_tensor(1, 2, HIDDEN), mask, positions)
    masked = m.Forward(m.CallId(1, 2), True, *(inputs.hidden, mask, positions), codec_id("fp32"))
    yield _script(_forward(1), _backward(1), masked, _backward(2))
    yield _script(_forward(1, keep=False), _backward(1), _backward(1, replay=inputs))
    yield _script(_forward(1, shape=(1, 40, HIDDEN)), _forward(1, shape=(1, 2, 8)))
    yield _script(_forward(1, shape=(2, 2, HIDDEN)), _backward(1))
    at = SiteSpec(2, "self_attn.q_proj")
    answer = m.SiteAnswer(m.CallId(1, 1), (_tensor(1, 2, HIDDEN),))
    gradient = m.SiteAnswer(m.CallId(1, 1), (_tensor(1, 2, HIDDEN, role=Role.GRADIENT),))
    yield _script(m.Sites(1, (at,)), _forward(1, sites=1), answer, _backward(1, sites=1), gradient)
    nothing, second = m.SiteAnswer(m.CallId(1, 1), ()), _forward(2, sites=1)
    yield _script(m.Sites(1, (at,)), _forward(1, sites=1), nothing, second, second)
    low = SiteSpec(2, "mlp.up_proj", Placement.LOW_RANK, 4, 5, Basis.SEEDED)
    small = m.SiteAnswer(m.CallId(1, 1), (_tensor(1, 2, 4),))
    tap = SiteSpec(3, "", Placement.TAP, 8, 9)
    yield _script(m.Sites(1, (low, tap)), _forward(1, sites=1), small, _backward(1, sites=1))
    yield _script(m.Sites(1, (SiteSpec(3, "mlp.up_proj", Placement.LOW_RANK, 4, 0, Basis.SVD),)), _forward(1, sites=1))
    weights = m.LeasedWeights(_tensor(2, HIDDEN, codec="fp32"), _tensor(HIDDEN, 2, codec="fp32"), 0.5)
    leased = m.Sites(1, (SiteSpec(2, "self_attn.q_proj", Placement.LEASED),))
    yield _script(leased, m.Lease(1, 1, (weights,)), _forward(1, sites=1, lease=1), _backward(1, sites=1, lease=1))
    yield _script(leased, _forward(1, sites=1), m.Lease(1, 2, (weights,)), m.Lease(1, 1, (weights, weights)))
    yield _script(m.Sites(1, (SiteSpec(0, "self_attn.q_proj"),)), m.Sites(1, (SiteSpec(2, "none"),)))
    yield _script(m.Ping(1), m.FetchList(m.FileSet.PARTS), m.Fetch(m.FileSet.PARTS, "config.json", 3), m.Goodbye(""))
    yield _script(
        m.FetchList(m.FileSet.ADAPTER), m.Fetch(m.FileSet.EMULATOR, "x"), m.Fetch(m.FileSet.PARTS, "x", 1 << 63)
    )
    yield _script(*(replace(_forward(1, keep=False), plan=plan) for plan in ("2:3", "2:2")))
    yield _script(*(m.FetchList(m.FileSet.EMULATOR, name) for name in (None, "a", "c")))


TARGET = Target(_run, _seeds, [TenantSession, SiteCalls, SiteLists, EdgeAdapters], floor=0.75, max_len=4096)
