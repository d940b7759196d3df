"""Calls with sites that are computed together: the bits of each by itself, whoever else is there, fails, or leaves."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import CONFIGS, tiny_checkpoint
from support.protocol.wire import TENANT
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.weight_quantization import quantizer_of
from isthmus.backbone.decoding.decode_pass import DecodePass
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime import leased_lora
from isthmus.backbone.runtime.batched_products import ProductBatches, ProductRequest, Products
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

THREADS = CallThreads(1, 16)
FP32 = codec_id("fp32")
BIG = 1 << 26
LAYERS = (1, 2, 3, 4)
RANK = 3


def host_of(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, quantize: str = "none"
) -> SiteHost:
    torch.set_num_threads(1)
    checkpoint = Checkpoint(tiny_checkpoint(family, folder / f"{family}-{dtype}"), family)
    plan = SplitPlan.parse("1:1", checkpoint.config.num_hidden_layers)
    return SiteHost(load_span(checkpoint, plan, dtype=dtype, quantizer=quantizer_of(quantize)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SiteHost:
    return host_of(tmp_path_factory.mktemp("together"))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_placement_has_the_bits_of_each_by_itself(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    host = host_of(tmp_path, family, dtype)
    executor, tenants = Executor(host, dtype, BIG), tenants_of(host)
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    play(edges)
    for mine, theirs in zip(edges, expected, strict=True):
        assert mine.heard == theirs
    assert host.product_batches.requests_per_batch > 2
    assert executor.cache.used == 0


@pytest.mark.parametrize("cached", ["kept", "inputs", "nothing"])
@pytest.mark.parametrize("seed", range(2))
def test_whoever_is_late_or_has_to_be_computed_again_changes_no_bit(llama: SiteHost, seed: int, cached: str) -> None:
    """At each turn some have not answered yet; others are anywhere in their passes."""
    tenants = tenants_of(llama)
    executor = Executor(llama, torch.float32, BIG)
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    order = random.Random(seed)  # noqa: S311  # no secret

    def forget() -> None:
        if cached == "nothing":
            executor.cache.evict_all()
        elif cached == "inputs":
            for entry in executor.cache._entries.values():
                if entry.graph is not None:
                    executor.cache._drop(entry.graph)

    play(edges, forget, lambda ready: order.sample(list(ready), order.randint(1, len(ready))))
    for mine, theirs in zip(edges, expected, strict=True):
        again = [entry for entry in mine.heard if m.SitePhase.AGAIN in entry]
        heard = [(*entry[:2], False) if entry[-1] is True else entry for entry in mine.heard if entry not in again]
        assert heard == theirs
    assert executor.cache.counters.recomputed == (0 if cached == "kept" else sum(tenant.keep for tenant in tenants))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantized_span_has_the_bits_of_each_by_itself(tmp_path: Path, quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    host = host_of(tmp_path, quantize=quantize)
    executor, tenants = Executor(host, torch.float32, BIG), tenants_of(host)[:4]
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    play(edges)
    assert [mine.heard for mine in edges] == expected
    assert host.product_batches.requests_per_batch > 1.5


# What is shared -------------------------------------------------------------------------------------------------------


def products(host: SiteHost, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls in each batch of products, in order."""
    host.product_batches = ProductBatches()
    met: list[int] = []
    hold = ProductBatches.compute

    def noted(self: ProductBatches, parties: Sequence[object]) -> object:
        met.append(len(parties))
        return hold(self, parties)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(ProductBatches, "compute", noted)
    return met


def test_calls_alike_meet_at_every_group_both_ways(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    met = products(llama, monkeypatch)
    executor, tenant = Executor(llama, torch.float32, BIG), tenants_of(llama)[0]
    play([edge(executor, tenant, number) for number in range(3)])
    assert met == [3] * (2 * len(llama.groups))
    assert llama.product_batches.requests_per_batch == 3


def test_what_is_lent_by_several_is_one_product_both_ways(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different ranks, and beside a call that lends nothing."""
    ranks: list[list[int]] = []
    real = leased_lora.grouped_low_rank

    def noted(x: Tensor, sizes: Sequence[int], downs: Sequence[Tensor], *rest: Any) -> Tensor:
        ranks.append([len(down) for down in downs])
        return real(x, sizes, downs, *rest)

    monkeypatch.setattr(leased_lora, "grouped_low_rank", noted)
    executor, tenants = Executor(llama, torch.float32, BIG), tenants_of(llama)
    play([edge(executor, tenants[at], number) for number, at in enumerate((3, 3, 5))])
    assert ranks == [[RANK, RANK + 1]] * (2 * len(tenants[3].sites))


def test_calls_that_ask_at_different_layers_meet_again(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is behind catches up as far as the other stands, if both go on at a time."""
    met = products(llama, monkeypatch)
    executor = Executor(llama, torch.float32, BIG)
    place = llama.groups[0][0][1]
    early, late = (Tenant((SiteSpec(layer, place),), keep=False) for layer in (1, 4))
    edges = [edge(executor, early, 0), edge(executor, late, 1)]
    ready = [(each.session, each.forward()) for each in edges]
    questions = step_batch(ready)  # the first asks at once, the second three layers later
    assert met == []  # nobody was beside the second one
    step_batch([(each.session, each.next(said)) for each, said in zip(edges, questions, strict=True)])
    groups = len(llama.groups) // len(LAYERS)
    assert met == [1] * (3 * groups) + [2] * groups


def test_a_call_alone_computes_without_a_meeting(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    met = products(llama, monkeypatch)
    executor = Executor(llama, torch.float32, BIG)
    play([edge(executor, tenants_of(llama)[0], 0)])
    assert met == []


def test_nobody_holds_memory_of_another(llama: SiteHost) -> None:
    """A graph that was built beside others is as large as one that was built alone."""
    executor, tenant = Executor(llama, torch.float32, BIG), tenants_of(llama)[3]
    own = 0
    for number in range(3):
        only = edge(executor, tenant, number)
        only.session.handle(only.forward())
        own += executor.cache.used
        only.session.close()
    edges = [edge(executor, tenant, number) for number in range(3)]
    step_batch([(each.session, each.forward()) for each in edges])
    assert executor.cache.used == own
    for each in edges:
        each.session.close()


def test_the_time_of_a_meeting_is_its_calls_own(llama: SiteHost) -> None:
    executor, tenant = Executor(llama, torch.float32, BIG), tenants_of(llama)[3]
    edges = [edge(executor, tenant, number) for number in range(2)]
    for said in step_batch([(each.session, each.forward()) for each in edges]):
        assert isinstance(said, m.ForwardReply)
        assert said.compute_ns > 0


# One of them fails, or leaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["a bad answer", "closed", "dropped", "no such list"])
def test_who_leaves_in_the_middle_disturbs_nobody(llama: SiteHost, ending: str) -> None:
    executor, tenants = Executor(llama, torch.float32, BIG), tenants_of(llama)[:4]
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    leaver = edge(executor, tenants[0], 9)
    if ending == "a bad answer":
        answers = leaver.answers
        leaver.answers = lambda question: () if len(leaver.heard) > 2 else answers(question)  # type: ignore[method-assign]
    elif ending == "no such list":
        leaver.session.calls.lists._lists.clear()

    def choose(ready: Sequence[Edge]) -> Sequence[Edge]:
        if len(leaver.heard) == 2 and ending in ("closed", "dropped"):
            if ending == "closed":
                leaver.session.close()
            else:
                leaver.session.calls.drop(1)
        return ready

    play([leaver, *edges], choose=choose)
    (said,) = leaver.heard[-1]
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.BAD_REQUEST
    assert [mine.heard for mine in edges] == expected
    assert not leaver.session.calls.begun
    assert executor.cache.used == 0


def test_a_product_that_fails_ends_the_calls_that_were_there(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Executor(llama, torch.float32, BIG)
    place = llama.groups[0][0][1]
    tenants = [Tenant((SiteSpec(4, place),)), Tenant((SiteSpec(4, place),)), Tenant((SiteSpec(1, place),))]
    expected = alone(executor, tenants[2], 2)
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]

    def exhausted(*_: object) -> None:
        raise RuntimeError("out of memory: 1.2345")

    with monkeypatch.context() as patch:
        patch.setattr(ProductBatches, "compute", exhausted)
        *failed, question = step_batch([(each.session, each.forward()) for each in edges])
    for said in failed:
        assert isinstance(said, m.Status)
        assert said.code == m.StatusCode.INTERNAL
        assert "1.2345" not in said.message
    assert not any(each.session.calls.begun for each in edges[:2])
    message = edges[2].next(question)  # type: ignore[arg-type]  # it asked before the others' products
    while message is not None:
        message = edges[2].next(edges[2].session.handle(message))
    assert edges[2].heard == expected
    assert executor.cache.used == 0


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_a_meeting_that_fails_is_held_again_for_each_of_its_calls(
    llama: SiteHost, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, tenants = Executor(llama, torch.float32, BIG), tenants_of(llama)[:4]
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    hold = ProductBatches.compute
    failed: list[weakref.ref[Tensor]] = []
    large = tenants[2].shape[0] * tenants[2].shape[1]
    limit = 10_000

    def limited(self: ProductBatches, parties: Sequence[ProductRequest]) -> list[Products]:
        assert not any(each() is not None for each in failed), "a batch that has failed still holds memory"
        rows = torch.empty(sum(party.n_rows for party in parties))
        if len(parties) > 1 or len(rows) > limit:
            failed.append(weakref.ref(rows))
            raise error("out of memory: 1.2345")
        return hold(self, parties)

    monkeypatch.setattr(ProductBatches, "compute", limited)
    play(edges)
    assert failed
    assert [mine.heard for mine in edges] == expected
    limit = large - 1  # the others are smaller
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    play(edges)
    for number, (mine, theirs) in enumerate(zip(edges, expected, strict=True)):
        if number != 2:
            assert mine.heard == theirs
    (said,) = edges[2].heard[-1]
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.INTERNAL
    assert "1.2345" not in said.message
    assert executor.cache.used == 0


def test_a_call_that_fails_holds_no_memory_while_others_go_on(llama: SiteHost) -> None:
    executor, tenant = Executor(llama, torch.float32, BIG), Tenant((SiteSpec(4, llama.groups[0][0][1]),))
    edges = [edge(executor, tenant, number) for number in range(2)]
    failed: list[weakref.ref[Tensor]] = []

    def allocate(layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if not failed:
            failed.append(weakref.ref(args[0]))
            raise RuntimeError("out of memory")
        assert failed[0]() is None

    hook = llama.span.base.layers[1].register_forward_pre_hook(allocate)
    gc.disable()  # whose help is not to be needed
    try:
        bad, good = step_batch([(each.session, each.forward()) for each in edges])
    finally:
        gc.enable()
        hook.remove()
    assert isinstance(bad, m.Status)
    assert bad.code == m.StatusCode.INTERNAL
    assert isinstance(good, m.SiteQuestion)
    edges[1].session.close()


# Kinds ----------------------------------------------------------------------------------------------------------------


def test_each_step_of_a_call_has_a_kind_of_its_own(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    for number, tenant in enumerate(tenants_of(llama)):
        mine = edge(executor, tenant, number)
        play([mine])
        kinds = [kind for kind in mine.kinds if kind is not None]
        assert len(kinds) == len(mine.kinds)
        assert kinds[0].name == "sites forward"
        assert not any(kind.parallel for kind in kinds)
        assert len({kind.name for kind in kinds}) == len(kinds)


def test_steps_are_of_one_kind_where_their_calls_stand_at_one_place(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    (first, name), (_, last) = llama.groups[0][0], llama.groups[0][-1]
    kinds: list[Mapping[str, Kind | None]] = []
    for number, part in enumerate((name, last)):
        mine = edge(executor, Tenant((SiteSpec(first, part), SiteSpec(4, part))), number)
        play([mine])
        kinds.append({kind.name: kind for kind in mine.kinds if kind is not None})
    assert kinds[0] == kinds[1]


def test_an_answer_has_the_positions_of_its_call(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    mine = edge(executor, tenants_of(llama)[0], 0)
    answer = mine.next(mine.session.handle(mine.forward()))
    assert isinstance(answer, m.SiteAnswer)
    assert mine.session.calls.positions(answer) == 14
    other = m.SiteAnswer(m.CallId(1, 99), ())
    assert mine.session.calls.positions(other) == 0
    assert mine.session.kind_of(other) is None
    mine.session.close()


def test_without_batching_no_step_has_a_kind(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    mine = edge(executor, tenants_of(llama)[0], 0, batching=False)
    assert mine.session.kind_of(mine.forward()) is None
    answer = mine.next(mine.session.handle(mine.forward()))
    assert answer is not None
    assert mine.session.kind_of(answer) is None
    mine.session.close()
