"""Tenants with sites of every placement, and edges that answer the questions of their calls in a batch or alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from support.models.tiny import tiny_checkpoint
from support.protocol.wire import TENANT
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.weight_quantization import quantizer_of
from isthmus.backbone.decoding.decode_pass import DecodePass
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.backbone.split.span import load_span
from isthmus.cloud.decoding.cache_pool import CachePool
from isthmus.cloud.decoding.decode_calls import Decoding
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.engine.requests import Kind
from isthmus.cloud.session.batched_calls import SiteStep, step_batch
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.site_calls import SiteCalls
from isthmus.cloud.session.site_lists import SiteLists
from isthmus.protocol import messages as m
from isthmus.protocol.limits import DEFAULT_LIMITS
from isthmus.protocol.tensor_codecs import Payload, Role, codec_id, decode, encode, encode_mask, encode_positions

FP32 = codec_id("fp32")
LAYERS = (1, 2, 3, 4)
RANK = 3
THREADS = CallThreads(1, 16)


def host_of(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, quantize: str = "none"
) -> SiteHost:
    torch.set_num_threads(1)
    checkpoint = Checkpoint(tiny_checkpoint(family, folder / f"{family}-{dtype}"), family)
    plan = SplitPlan.parse("1:1", checkpoint.config.num_hidden_layers)
    return SiteHost(load_span(checkpoint, plan, dtype=dtype, quantizer=quantizer_of(quantize)))


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_wire(tensor: Tensor, role: Role) -> Payload:
    return encode(tensor, "fp32", role)


@dataclass(frozen=True)
class Tenant:
    """What one of them does: its sites, its input, whether a backward follows, and whether that wants a gradient."""

    sites: tuple[SiteSpec, ...]
    shape: tuple[int, int] = (2, 8)
    masked: bool = False
    positions: bool = False
    keep: bool = True
    wanted: bool = True


@dataclass
class Edge:
    """A tenant's end of a session: it answers with a fixed matrix at each site, and notes all that it hears."""

    tenant: Tenant
    session: TenantSession
    seed: int
    said: list[m.Message] = field(default_factory=list)
    kinds: list[Kind | None] = field(default_factory=list)
    heard: list[tuple[object, ...]] = field(default_factory=list)
    contributions: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        host, specs = self.session.executor.host, self.tenant.sites
        self.session.handle(m.Sites(1, specs))
        leased = [spec for spec in specs if spec.is_leased]
        if leased:
            weights = []
            for number, spec in enumerate(leased):
                n_in, n_out = host.widths(spec)
                rank = RANK + self.seed // 1000  # each edge has one of its own
                down, up = (
                    0.2 * random_tensor(*shape, seed=self.seed + number) for shape in ((rank, n_in), (n_out, rank))
                )
                weights.append(m.LeasedWeights(on_wire(down, Role.ACTIVATION), on_wire(up, Role.ACTIVATION), 0.5))
            self.session.handle(m.Lease(1, 1, tuple(weights)))

    def hidden(self, role: Role) -> Payload:
        width = self.session.executor.host.span.hidden_size
        return on_wire(random_tensor(*self.tenant.shape, width, seed=self.seed + (role == Role.GRADIENT)), role)

    def inputs(self) -> m.SpanInputs:
        rows, length = self.tenant.shape
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, :2] = 0
        return m.SpanInputs(
            self.hidden(Role.ACTIVATION),
            encode_mask(mask) if self.tenant.masked else None,
            encode_positions(torch.arange(length)[None]) if self.tenant.positions else None,
        )

    def forward(self) -> m.Forward:
        given, tenant = self.inputs(), self.tenant
        masks = (given.attention_mask, given.position_ids)
        lease = 1 if any(spec.is_leased for spec in tenant.sites) else 0
        return m.Forward(m.CallId(1, 1), tenant.keep, given.hidden, *masks, FP32, 1, tenant.wanted, lease)

    def backward(self, *, replay: bool = False) -> m.Backward:
        lease = 1 if any(spec.is_leased for spec in self.tenant.sites) else 0
        again = self.inputs() if replay else None
        return m.Backward(m.CallId(1, 1, 3), self.hidden(Role.GRADIENT), again, FP32, 1, self.tenant.wanted, lease)

    def next(self, said: m.Message | None) -> m.Message | None:
        """What this edge says after the cloud has said something; None when its step is over."""
        match said:
            case m.SiteQuestion():
                self.heard.append((said.phase, said.sites, said.tensors))
                return m.SiteAnswer(said.id, self.answers(said))
            case m.ForwardReply():
                self.heard.append((said.hidden, said.taps))
                return self.backward() if self.tenant.keep else None
            case m.BackwardReply():
                self.heard.append((said.gradient, said.leased, said.recomputed))
                return None
            case m.Status(m.StatusCode.ACTIVATIONS_LOST):
                return self.backward(replay=True)
            case _:
                self.heard.append((said,))
                return None

    def answers(self, question: m.SiteQuestion) -> tuple[Payload, ...]:
        given = [decode(tensor) for tensor in question.tensors]
        if question.phase == m.SitePhase.FORWARD:
            alike = given * len(question.sites) if len(given) == 1 else given
            for site, x in zip(question.sites, alike, strict=True):
                self.contributions[site] = x @ self.matrix(site)
        if question.phase in (m.SitePhase.FORWARD, m.SitePhase.AGAIN):
            return tuple(on_wire(self.contributions[site], Role.ACTIVATION) for site in question.sites)
        if question.phase == m.SitePhase.BACKWARD_ONLY:
            return ()
        pairs = zip(question.sites, given, strict=True)
        return tuple(on_wire(gradient @ self.matrix(site).T, Role.GRADIENT) for site, gradient in pairs)

    def matrix(self, site: int) -> Tensor:
        widths = self.session.executor.host.widths(self.tenant.sites[site])
        return 0.1 * random_tensor(*widths, seed=self.seed + 31 * site)


def edge(executor: Executor, tenant: Tenant, number: int, *, batching: bool = True) -> Edge:
    session_id = bytes([number, batching]) * 8
    calls = SiteCalls(SiteLists(session_id, TENANT, executor, DEFAULT_LIMITS, allowed=True), THREADS, batching)
    decoding = Decoding(executor, DecodePass(executor.host.span, None), CachePool(0), 1)
    session = TenantSession(session_id, executor, {}, None, calls, decoding, executor.host.span.hidden_size, 4096)
    return Edge(tenant, session, 1000 * number)


def play(
    edges: Sequence[Edge],
    between: Callable[[], None] = lambda: None,
    choose: Callable[[Sequence[Edge]], Sequence[Edge]] = lambda ready: ready,
) -> None:
    """Let all edges do a step, those that are chosen together; `between` comes before the first backward of all."""
    saying: dict[int, m.Message] = {number: each.forward() for number, each in enumerate(edges)}
    forwards = True
    while saying:
        if forwards and all(isinstance(message, m.Backward) for message in saying.values()):
            forwards = False
            between()
        ready = {n: message for n, message in saying.items() if not forwards or not isinstance(message, m.Backward)}
        picked = {each.seed for each in choose([edges[n] for n in ready])}
        chosen = [n for n in ready if edges[n].seed in picked]
        asked: list[SiteStep] = [(edges[n].session, ready[n]) for n in chosen]
        for number, (session, message) in zip(chosen, asked, strict=True):
            edges[number].kinds.append(session.kind_of(message))
        for number, said in zip(chosen, step_batch(asked), strict=True):
            assert not isinstance(said, Exception), said
            answer = edges[number].next(said)
            if answer is None:
                del saying[number]
            else:
                saying[number] = answer


def alone(executor: Executor, tenant: Tenant, number: int, between: Callable[[], None] = lambda: None) -> list[object]:
    """What a tenant hears from a cloud that computes nothing together."""
    mine = edge(executor, tenant, number, batching=False)
    message: m.Message | None = mine.forward()
    while message is not None:
        if isinstance(message, m.Backward):
            between()
        message = mine.next(mine.session.handle(message))
    mine.session.close()
    return mine.heard


def tenants_of(host: SiteHost) -> list[Tenant]:
    """Several of each placement, at different places."""
    in_layer: dict[int, list[tuple[tuple[int, str], ...]]] = {layer: [] for layer in LAYERS}
    for group in host.groups:
        in_layer[group[0][0]].append(group)

    def ends(layer: int) -> list[tuple[int, str]]:
        """The first and the last linear of a layer's first group: q and v."""
        first = in_layer[layer][0]
        return list(dict.fromkeys((first[0], first[-1])))

    on_edge = [SiteSpec(*place) for layer in LAYERS for place in ends(layer)]
    low = [SiteSpec(*ends(layer)[0], Placement.LOW_RANK, RANK, 5) for layer in LAYERS[1:]]
    return [
        Tenant(tuple(on_edge), (2, 7), masked=True),
        Tenant(tuple(on_edge[:3]), (1, 12), positions=True),
        Tenant((SiteSpec(*in_layer[3][-1][0]), SiteSpec(2, "")), (3, 7), wanted=False),
        Tenant(
            tuple(SiteSpec(*place, Placement.LEASED) for layer in LAYERS for place in ends(layer)), (1, 16), masked=True
        ),
        Tenant((*low, SiteSpec(3, "", Placement.TAP, 4), SiteSpec(4, "", Placement.TAP)), (2, 9), masked=True),
        Tenant((SiteSpec(2, "", Placement.TAP, 4),), (2, 8), keep=False),
        Tenant(tuple(SiteSpec(*place) for group in in_layer[2] for place in group), (2, 8)),
        Tenant((SiteSpec(*ends(1)[0], Placement.LEASED_FROZEN), SiteSpec(*ends(4)[-1])), (4, 5), wanted=False),
    ]
