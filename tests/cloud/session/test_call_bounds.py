"""What one call may cost: lengths, positions and memory, refused before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import served
from support.cloud.memory_cloud import MemoryCloud, MemoryTransport, messages
from support.models.tiny import HIDDEN, tiny_checkpoint
from support.protocol.wire import EDGE, PIN, TENANT

from isthmus.backbone.runtime.call_memory import CallShape, Pass
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import ConfigError
from isthmus.edge.client.link import Link
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Role, codec_id, encode, encode_positions

FP32 = codec_id("fp32")
LONGEST = 128  # what the tiny model is made for


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("bounds")
    return served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=1 << 16)


@pytest.fixture
def tenant(cloud: Served) -> Iterator[TenantSession]:
    session = cloud.session(b"s" * 16, TENANT, CallThreads(1, 16))
    yield session
    session.close()
    cloud.executor.compute_bytes = 1 << 40


@pytest.fixture
def idle(cloud: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The span must not run."""

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the span runs")

    for name in ("forward", "forward_together", "backward", "backward_together"):
        monkeypatch.setattr(type(cloud.executor), name, run)


def inputs(batch: int, sequence: int, positions: torch.Tensor | None = None) -> m.SpanInputs:
    hidden = encode(torch.zeros(batch, sequence, HIDDEN), "fp32", Role.ACTIVATION)
    return m.SpanInputs(hidden, None, None if positions is None else encode_positions(positions))


def forward(given: m.SpanInputs, *, keep: bool = True, sites: int = 0) -> m.Forward:
    return m.Forward(m.CallId(1, 1), keep, given.hidden, given.attention_mask, given.position_ids, FP32, sites)


def backward(given: m.SpanInputs, *, call: int = 1, sites: int = 0, replay: bool = True) -> m.Backward:
    gradient = encode(torch.zeros(given.hidden.shape), "fp32", Role.GRADIENT)
    return m.Backward(m.CallId(1, call), gradient, given if replay else None, FP32, sites)


def refused(answer: m.Message | None, *says: object) -> None:
    assert isinstance(answer, m.Status)
    assert answer.code == m.StatusCode.BAD_REQUEST
    assert all(str(each) in answer.message for each in says), answer.message


# Lengths and positions ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle")
def test_a_sequence_beyond_the_model_is_refused_before_it_is_computed(tenant: TenantSession) -> None:
    long = inputs(1, 16384)  # 2 MiB; took 2 GiB and seconds where only batch x sequence was checked
    refused(tenant.handle(forward(long)), 16384, LONGEST, "cut it")
    refused(tenant.handle(backward(long)), 16384, LONGEST)
    short = inputs(1, 2, torch.tensor([[0, LONGEST]]))
    refused(tenant.handle(forward(short)), f"0 to {LONGEST}")
    refused(tenant.handle(forward(inputs(1, 2, torch.tensor([[-2, 0]])))), "-2 to 0")
    assert tenant.call_bytes(m.Ping(1)) == 0


def test_what_the_model_is_made_for_is_computed(tenant: TenantSession) -> None:
    positions = torch.arange(LONGEST)[None] - 1  # as padding on the left is numbered
    assert isinstance(tenant.handle(forward(inputs(1, LONGEST, positions))), m.ForwardReply)


def test_an_edge_refuses_it_before_it_sends_anything(
    cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    there = MemoryCloud(cloud)
    link = Link(MemoryTransport(there), PIN, EDGE, name="cloud:1")
    link.open(5)
    model = link.load_model()
    with pytest.raises(ConfigError, match=f"{LONGEST + 1} tokens is longer than the {LONGEST}"):
        model(input_ids=torch.ones(1, LONGEST + 1, dtype=torch.long))
    with pytest.raises(ConfigError, match="position ids from 0 to 500"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([[0, 500]]))
    assert not messages(there, m.Forward)
    model(input_ids=torch.ones(1, LONGEST, dtype=torch.long))
    assert len(messages(there, m.Forward)) == 1


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle")
def test_a_call_that_takes_more_than_the_budget_is_refused_before_it_is_computed(tenant: TenantSession) -> None:
    executor = tenant.executor
    needed = executor.memory.of(CallShape(4, 64, Pass.BACKWARD))
    executor.compute_bytes = needed - 1
    refused(tenant.handle(forward(inputs(4, 64))), needed, needed - 1, "4 x 64", "send fewer")
    refused(tenant.handle(backward(inputs(4, 64))), needed, needed - 1)
    executor.compute_bytes = needed
    with pytest.raises(AssertionError, match="the span runs"):
        tenant.handle(forward(inputs(4, 64)))


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("keep", [False, True])
def test_a_call_that_will_be_refused_waits_for_no_memory(tenant: TenantSession, keep: bool) -> None:
    executor, given = tenant.executor, inputs(4, 64)
    needed = executor.memory.of(CallShape(4, 64, Pass.BACKWARD if keep else Pass.FORWARD))
    executor.compute_bytes = needed
    assert 0 < tenant.call_bytes(forward(given, keep=keep)) <= needed
    executor.compute_bytes = needed - 1
    assert tenant.call_bytes(forward(given, keep=keep)) == 0
    assert tenant.call_bytes(backward(given)) == 0
    refused(tenant.handle(forward(given, keep=keep)), needed)
    refused(tenant.handle(backward(given)), "send fewer")


def test_a_forward_leaves_room_for_its_backward(tenant: TenantSession) -> None:
    memory = tenant.executor.memory
    shape = CallShape(4, 64, Pass.KEPT_FORWARD)
    tenant.executor.compute_bytes = memory.of(shape)
    assert memory.of(dataclasses.replace(shape, what=Pass.BACKWARD)) > memory.of(shape)
    refused(tenant.handle(forward(inputs(4, 64))), "4 x 64")
    assert isinstance(tenant.handle(forward(inputs(4, 64), keep=False)), m.ForwardReply)


def test_a_call_that_may_pause_takes_half_of_the_budget_at_most(tenant: TenantSession) -> None:
    tenant.handle(m.Sites(1, (SiteSpec(2, "self_attn.q_proj"),)))
    needed = tenant.executor.memory.of(CallShape(2, 8, Pass.FORWARD, passing=2 * (HIDDEN + 32)))
    tenant.executor.compute_bytes = 2 * needed - 2
    refused(tenant.handle(forward(inputs(2, 8), keep=False, sites=1)), needed, "half of it")
    tenant.executor.compute_bytes = 2 * needed
    assert isinstance(tenant.handle(forward(inputs(2, 8), keep=False, sites=1)), m.SiteQuestion)


def test_of_the_memory_of_calls_that_have_begun_a_tenant_has_no_more_than_it_leaves() -> None:
    threads = CallThreads(1, 16, 100)
    first = threads.claim("a", 40)
    assert first.ready.done()
    second, other = threads.claim("a", 30), threads.claim("b", 30)
    assert not second.ready.done(), "a would have 70 of 100"
    assert other.ready.done()
    first.give_back()
    assert second.ready.done()
    for each in (second, other):
        each.give_back()
    assert threads.claim("a", 50).ready.done()


def test_small_calls_do_not_keep_the_memory_from_a_large_one_that_waits_for_other_tenants() -> None:
    threads = CallThreads(1, 16, 100)
    first = threads.claim("a", 50)
    large = threads.claim("b", 30)
    small = [threads.claim(tenant, 10) for tenant in ("c", "d")]
    none = threads.claim("e")
    assert [each.ready.done() for each in (large, *small, none)] == [False, False, False, True]
    first.give_back()
    assert [each.ready.done() for each in (large, *small)] == [True, True, True]


def test_a_call_that_waits_for_its_own_tenant_keeps_no_memory_from_others() -> None:
    threads = CallThreads(1, 16, 100)
    first, more = threads.claim("a", 40), threads.claim("a", 20)
    other = threads.claim("b", 20)
    assert [each.ready.done() for each in (first, more, other)] == [True, False, True]
    within = threads.claim("a", 10)  # as much as a tenant may have, once others have less
    behind = threads.claim("c", 10)
    assert [each.ready.done() for each in (within, behind)] == [False, False]
    other.give_back()
    assert [each.ready.done() for each in (more, within, behind)] == [False, True, True]


def test_a_call_that_waits_and_is_given_up_frees_those_behind_it() -> None:
    threads = CallThreads(1, 16, 100)
    threads.claim("a", 50)
    large, small = threads.claim("b", 30), threads.claim("c", 10)
    assert not small.ready.done()
    large.give_back()
    assert small.ready.done()


def test_a_call_that_takes_more_than_a_tenant_may_have_claims_no_thread() -> None:
    threads = CallThreads(1, 16, 100)
    with pytest.raises(ValueError, match=r"about 51 bytes .* within 100, half of it"):
        threads.claim("a", 51)
    assert threads.claim("a", 50).ready.done()


def test_backwards_whose_forwards_are_lost_pause_within_the_budget(cloud: Served) -> None:
    given = inputs(1, 64)
    shape = CallShape(1, 64, Pass.BACKWARD, passing=2 * (HIDDEN + 32))
    needed = cloud.executor.memory.of(shape)
    assert cloud.executor.memory.of(dataclasses.replace(shape, masked=True)) > needed
    threads = CallThreads(1, 16, 2 * needed)
    session = cloud.session(b"l" * 16, TENANT, threads)
    session.handle(m.Sites(1, (SiteSpec(2, "self_attn.q_proj"),)))
    try:
        assert isinstance(session.handle(backward(given, call=1, sites=1)), m.SiteQuestion)
        assert threads._held_bytes[TENANT.name] == needed
        refused(session.handle(backward(given, call=2, sites=1)), "no thread is free")
        masked = m.SpanInputs(given.hidden, None, encode_positions(torch.arange(64)[None]))
        refused(session.handle(backward(masked, call=3, sites=1)), 2 * needed, "half of it")
    finally:
        session.close()


def test_a_backward_counts_as_masked_where_its_forward_or_its_replay_is(tenant: TenantSession) -> None:
    plain, packed = inputs(1, 64), inputs(1, 64, torch.arange(64)[None])
    memory, shape = tenant.executor.memory, CallShape(1, 64, Pass.BACKWARD)
    small, large = memory.of(shape), memory.of(dataclasses.replace(shape, masked=True))
    assert tenant.call_bytes(backward(plain, replay=False)) == 0  # its input has to come again
    assert tenant.call_bytes(backward(plain)) == small < large == tenant.call_bytes(backward(packed))
    tenant.handle(forward(plain))
    assert tenant.call_bytes(backward(plain, replay=False)) == small
    assert tenant.call_bytes(backward(packed)) == large  # what is kept may be evicted by then
    tenant.handle(forward(packed))
    assert tenant.call_bytes(backward(plain, replay=False)) == tenant.call_bytes(backward(plain)) == large


@pytest.mark.usefixtures("idle")
def test_taps_whose_answer_fits_no_message_are_refused_before_they_are_computed(cloud: Served) -> None:
    limits = Limits(max_message_bytes=3 * 4 * 64 * HIDDEN * 4)
    tenant = cloud.session(b"t" * 16, TENANT, CallThreads(1, 16), limits)
    taps = tuple(SiteSpec(layer, "", Placement.TAP) for layer in (2, 3))
    tenant.handle(m.Sites(1, taps))
    refused(tenant.handle(forward(inputs(8, 64), keep=False, sites=1)), "2 taps", 3 * 8 * 64 * HIDDEN * 4)
    tenant.close()


# What others have to do with it ---------------------------------------------------------------------------------------
